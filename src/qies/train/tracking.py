"""Log metrics to TensorBoard and trackio. metrics.jsonl remains the record.

Trackers are not part of a run's configuration, since they do not affect its results. When a run resumes, or is tracked
for the first time, missing steps are copied from metrics.jsonl and steps that will be repeated are deleted, so every
step is logged exactly once.
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

SERIES = ("loss", "grad_norm", "lr_factor", "tokens", "seconds")  # logged of each row, unless missing or None
RESULTS = ("val_loss", "val_loss_clean", "val_bpb", "train_loss")  # logged after the last step


class Tracker(Protocol):
    """A destination for the scalars of one run, opened at the step at which the run resumes.

    It deletes what it holds from `start` on, and the rows from there are written to it again.
    """

    start: int

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `tensorboard/` of the run directory; `tensorboard --logdir` on `runs/` shows a whole ladder."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        own = folder / "tensorboard"
        self.start = step if any(own.glob("events.*")) else 0
        self.writer = SummaryWriter(str(own), purge_step=self.start)  # readers discard events from there on

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a run that resumes from the next checkpoint does not repeat this step

    def close(self) -> None:
        self.writer.close()


class Trackio:
    """trackio's local store (in TRACKIO_DIR): project "qies", the run named by its arm, size, seed and hash.

    Nothing is sent over the network, and system metrics are not logged. trackio cannot delete single steps, so the run
    is deleted and written again.
    """

    PROJECT = "qies"
    REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")  # with these, trackio uploads

    start = 0

    def __init__(self, folder: Path, step: int) -> None:
        import trackio

        self.trackio = trackio
        record = records.read(folder)
        assert record is not None
        self.name = f"{record.arm}-{record.size}-seed{record.seed}-{record.config_hash[:8]}"
        with contextlib.redirect_stdout(sys.stderr):  # stdout is reserved for results
            with contextlib.suppress(ValueError):  # no project yet
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
    """Parse names such as `tensorboard,trackio`. Raises UserError for an unknown name or a missing package."""
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
    """Context manager that yields a function to call with each row of metrics. Logs the results at the end."""
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
            if not opened:  # the run resumed after its last step
                fill(after.steps)
            for tracker in opened:
                tracker.write(after.steps, {k: after.metrics[k] for k in RESULTS if k in after.metrics})
    finally:
        for tracker in opened:
            tracker.close()
