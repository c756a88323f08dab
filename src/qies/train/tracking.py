"""Metrics in TensorBoard and trackio: copies of metrics.jsonl, which stays the record.

A tracker is no part of a run's configuration: it changes no result. When a run resumes, or is tracked for the first
time, what is missing comes from metrics.jsonl and what will be done again is dropped: every step is there once.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from qies import records
from qies.errors import UserError, require, unknown

SERIES = ("loss", "grad_norm", "lr_factor", "tokens", "seconds")  # of a row; what is missing or None is left out
RESULTS = ("val_loss", "val_loss_clean", "val_bpb", "train_loss")  # of a finished run, after its last step


class Tracker(Protocol):
    """Where scalars of one run go. Opened at the step the run goes on from, it drops what it holds from `start` on and
    wants the rows from there."""

    start: int

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `tensorboard/` of the run's folder; `tensorboard --logdir` on `runs/` shows a whole ladder."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        own = folder / "tensorboard"
        self.start = step if any(own.glob("events.*")) else 0
        self.writer = SummaryWriter(str(own), purge_step=self.start)  # readers forget what they saw from there on

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a checkpoint may follow, and a run that resumes from it does not do this step again

    def close(self) -> None:
        self.writer.close()


class Trackio:
    """trackio's local store (TRACKIO_DIR says where): project "qies", the run by its arm, size, seed and hash.

    Nothing is sent anywhere, and the machine's own load is not logged. trackio cannot drop single steps, so the run is
    dropped and filled again.
    """

    PROJECT = "qies"
    REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")  # what would make trackio send

    start = 0

    def __init__(self, folder: Path, step: int) -> None:
        import trackio

        self.trackio = trackio
        record = records.read(folder)
        assert record is not None
        self.name = f"{record.arm}-{record.size}-seed{record.seed}-{record.config_hash[:8]}"
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            with contextlib.suppress(ValueError):  # that there is no project yet
                for run in [run for run in trackio.Api().runs(self.PROJECT) if run.name == self.name]:
                    run.delete()
            self.run = trackio.init(
                self.PROJECT, self.name, group=f"{record.arm} {record.size}", config=record.config,
                embed=False, auto_log_gpu=False, auto_log_cpu=False,
            )  # fmt: skip

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self.trackio.finish()


TRACKERS: dict[str, Callable[[Path, int], Tracker]] = {"tensorboard": TensorBoard, "trackio": Trackio}


def parse(text: str) -> tuple[str, ...]:
    """The names in `tensorboard,trackio`. Raises UserError for an unknown one, or one whose package is missing."""
    names = tuple(word.strip() for word in text.split(",") if word.strip())
    for name in names:
        if name not in TRACKERS:
            raise unknown("value", name, TRACKERS, where="for --track")
        require(name, f"--track {name}", "track")
    if "trackio" in names and (remote := [name for name in Trackio.REMOTE if os.environ.get(name)]):
        raise UserError(f"--track trackio writes trackio's local store only; unset {', '.join(remote)}.")
    return names


@contextlib.contextmanager
def tracking(names: Sequence[str], folder: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields a function that takes each row of the run in `folder` once it is in metrics.jsonl; the results follow."""
    opened: list[Tracker] = []

    def fill(step: int) -> None:
        opened.extend(TRACKERS[name](folder, step) for name in names)
        for tracker in opened:
            for row in records.steps(folder)[tracker.start :]:
                write(tracker, row)

    def write(tracker: Tracker, row: Mapping[str, Any]) -> None:
        tracker.write(row["step"], {k: row[k] for k in SERIES if row.get(k) is not None})

    def see(row: dict[str, Any]) -> None:
        if not opened:
            return fill(row["step"])
        for tracker in opened:
            write(tracker, row)

    before = records.read(folder)
    try:
        yield see
        after = records.read(folder)
        if names and after and after.status == "done" and (before is None or before.status != "done"):
            if not opened:  # every step was done before, and only the end was missing
                fill(after.steps)
            for tracker in opened:
                tracker.write(after.steps, {k: after.metrics[k] for k in RESULTS if k in after.metrics})
    finally:
        for tracker in opened:
            tracker.close()
