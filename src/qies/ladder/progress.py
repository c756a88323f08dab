"""Progress of a ladder in the terminal."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from qies import config as configs
from qies.config import RunConfig, StudyConfig
from qies.ladder.plan import clock, estimate


class LadderProgress:
    """A progress bar over all runs, in estimated seconds of work, with a line for each run in progress."""

    def __init__(self, study: StudyConfig, todo: list[RunConfig], workers: int, console: Console) -> None:
        costs = dict(zip(map(configs.content_hash, study.runs()), estimate(study), strict=True))
        self.cost = {configs.content_hash(c): costs[configs.content_hash(c)] for c in todo}
        self.done = dict.fromkeys(self.cost, 0.0)
        self.workers, self.console = workers, console
        self.lines: dict[str, Any] = {}
        self.started = time.monotonic()
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
        )

    def __enter__(self) -> LadderProgress:
        self.progress.start()
        self.total = self.progress.add_task("all runs", total=sum(self.cost.values()), note="")
        return self

    def __exit__(self, *exc: object) -> None:
        self.progress.stop()

    def event(self, config: RunConfig, rows: list[dict[str, Any]], status: str) -> None:
        """Handle an event of `ladder.execute`: new metric rows of a run, or its end."""
        key = configs.content_hash(config)
        if key not in self.lines:
            name = f"{config.arm} {config.size} seed {config.seed}"
            self.lines[key] = self.progress.add_task(name, total=config.steps, note="starting")
        if rows:
            share = (rows[-1]["step"] + 1) / config.steps
            self.done[key] = share * self.cost[key]
            loss = rows[-1]["loss"]
            rate = rows[-1]["tokens"] / rows[-1]["seconds"]
            note = f"loss {loss:.3f}, {rate:,.0f} tok/s" if loss is not None else rows[-1]["skipped"]
            self.progress.update(self.lines[key], completed=rows[-1]["step"] + 1, note=note)
            done, spent = sum(self.done.values()), time.monotonic() - self.started
            left = (sum(self.cost.values()) - done) * spent / done
            self.progress.update(self.total, completed=done, note=f"{clock(left)} left")
        if status != "running":
            self.progress.remove_task(self.lines.pop(key))
            self.done[key] = 0.0 if status in ("retrying", "lost") else self.cost[key]
            self.console.print(f"{config.arm} {config.size} seed {config.seed}: {status}")
