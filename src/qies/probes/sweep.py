"""Many probes side by side: a grid of tasks, arms and seeds, resumable, and a table of how many seeds solved each."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from qies.config import content_hash, to_dict
from qies.errors import UserError
from qies.plugins import load, loaded
from qies.probes.protocol import SUCCESS, ProbeConfig, train_probe
from qies.storage import make_folder, write_json
from qies.workers import end_with_parent

SCHEMA = 1


@dataclass(frozen=True)
class ProbeSweep:
    """A grid of probes, and what is common to all of them.

    lrs: learning rates that every arm tries on each task with the first seed; the one with the best accuracy on
    validation rows, the lower of two equal ones, is that of the other seeds. None: `probe.lr`.
    """

    tasks: tuple[str, ...] = ("s3",)
    arms: tuple[str, ...] = ("qies", "no_phase", "transformer")
    seeds: tuple[int, ...] = (0,)
    lrs: tuple[float, ...] = ()
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    def __post_init__(self) -> None:
        for name in ("tasks", "arms", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError(f"{name} must be a list of at least one, without repeats, not {list(values)}.")
        if len(set(self.lrs)) < len(self.lrs):
            raise UserError(f"lrs must be a list without repeats, not {list(self.lrs)}.")
        self.first()

    def first(self) -> list[ProbeConfig]:
        """The first seed at every learning rate, by task and arm."""
        probes = [replace(self.probe, task=t, arm=a, seed=self.seeds[0]) for t in self.tasks for a in self.arms]
        return [replace(probe, lr=lr) for probe in probes for lr in self.lrs or (self.probe.lr,)]

    def __len__(self) -> int:
        """Probes of the whole sweep."""
        return len(self.tasks) * len(self.arms) * (len(self.seeds) - 1 + max(1, len(self.lrs)))


def run_sweep(
    sweep: ProbeSweep, out: Path, workers: int, progress: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """Train the probes that have no record in `out` yet, `workers` at a time, each on one thread; the records at the
    chosen learning rates, by task, arm and seed.

    A record is one JSON file, written when its probe ends, so that a killed sweep loses only what was in training.
    """
    make_folder(out)
    tries: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for record in train_missing(sweep.first(), out, workers, progress):
        tries[record["config"]["task"], record["config"]["arm"]].append(record)
    best = {cell: max(group, key=lambda r: (r["validation"], -r["config"]["lr"])) for cell, group in tries.items()}
    chosen = [replace(sweep.probe, task=t, arm=a, lr=first["config"]["lr"]) for (t, a), first in best.items()]
    others = [replace(probe, seed=seed) for probe in chosen for seed in sweep.seeds[1:]]
    trained = iter(train_missing(others, out, workers, progress))
    return [record for first in best.values() for record in (first, *itertools.islice(trained, len(sweep.seeds) - 1))]


def train_missing(
    probes: Sequence[ProbeConfig], out: Path, workers: int, progress: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """The records of `probes`, of which those without one are trained."""
    records = [read_record(out, probe) for probe in probes]
    for record in records:
        if record is not None:
            progress(record)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(loaded(),)) as pool:
        pending = {pool.submit(train_probe, p): i for i, p in enumerate(probes) if records[i] is None}
        try:
            for done in as_completed(pending):
                i = pending[done]
                record = {"schema": SCHEMA, "config": to_dict(probes[i]), **done.result()}
                write_json(_path(out, probes[i]), record)
                records[i] = record
                progress(record)
        except BaseException:  # do not wait for what is still in training
            for process in multiprocessing.active_children():
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [record for record in records if record is not None]


def read_record(out: Path, probe: ProbeConfig) -> dict[str, Any] | None:
    """The record of a finished probe, or None. Raises UserError for a file that is none."""
    path = _path(out, probe)
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        known = record["schema"] == SCHEMA and record["config"] == to_dict(probe)
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise UserError(f"{path} is not the record of this probe; delete it or give another --out.")
    return record


def summary(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each task and arm: seeds, how many solved the task at the longest length (accuracy at least 0.99 over
    all scored positions), mean accuracy by length, learning rate, parameters."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        cells[record["config"]["task"], record["config"]["arm"]].append(record)
    rows = []
    for (task, arm), group in cells.items():
        lengths = sorted({int(n) for record in group for n in record["accuracy"]})
        rows.append(
            {
                "task": task,
                "arm": arm,
                "seeds": len(group),
                "solved": sum(record["accuracy"][str(lengths[-1])] >= SUCCESS for record in group),
                "accuracy": {str(n): fmean(record["accuracy"][str(n)] for record in group) for n in lengths},
                "lr": group[0]["config"]["lr"],
                "chance": group[0]["chance"],
                "parameters": group[0]["parameters"],
            }
        )
    return rows


def _path(out: Path, probe: ProbeConfig) -> Path:
    return out / f"{probe.task}-{probe.arm}-{probe.seed}-{content_hash(probe)}.json".replace(":", "_")


def _start(plugins: Sequence[str]) -> None:
    """Prepare a worker: one thread, the plugins, and an end with the sweep, without which nobody writes its records."""
    end_with_parent()
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    load(plugins)
