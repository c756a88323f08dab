"""Interleaved timing of baselines in one process: percentiles, and ratios by pairs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

# Wall time, and the processor time of this process over all its threads: on one thread of an idle machine they are
# equal, and other load changes the second much less.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Comparison:
    """The result of one case. seconds, p90: median and 90th percentile per call. ratio: time relative to the subject,
    the median of the ratios of the rounds, so that drift of the machine's speed cancels; quartiles: of these ratios.

    facts: what describes the case in numbers (size, batch, context, tokens of a call); costs: of each baseline, what is
    known of it beside its time.
    """

    case: str
    subject: str
    rounds: int
    seconds: dict[str, float]
    p90: dict[str, float]
    ratio: dict[str, float]
    quartiles: dict[str, tuple[float, float]]
    facts: dict[str, Any] = field(default_factory=dict)
    costs: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> dict[str, float]:
        """From the medians, where a call's tokens are known."""
        tokens = self.facts.get("tokens")
        return {} if tokens is None else {name: tokens / seconds for name, seconds in self.seconds.items()}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"tokens_per_second": self.tokens_per_second}


def compare(
    case: str,
    baselines: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 5,
    warmup: int = 1,
    facts: Mapping[str, Any] | None = None,
    costs: Mapping[str, dict[str, Any]] | None = None,
    clock: str = "wall",
) -> Comparison:
    """Time `baselines` in turn, A B C A B C ..., after `warmup` rounds that do not count; the first is the subject.

    clock: a key of CLOCKS.
    """
    now = CLOCKS[clock]
    if rounds < 1 or not baselines:
        raise ValueError("compare needs at least one baseline and one round")
    times: dict[str, list[float]] = {name: [] for name in baselines}
    for i in range(warmup + rounds):
        for name, call in baselines.items():
            start = now()
            call()
            if i >= warmup:
                times[name].append(now() - start)
    subject = next(iter(baselines))
    ratios = {name: [t / s for t, s in zip(ts, times[subject], strict=True)] for name, ts in times.items()}

    def percentile(of: Mapping[str, list[float]], q: float) -> dict[str, float]:
        return {name: float(np.percentile(values, q)) for name, values in of.items()}

    low, high = percentile(ratios, 25), percentile(ratios, 75)
    return Comparison(
        case=case,
        subject=subject,
        rounds=rounds,
        seconds=percentile(times, 50),
        p90=percentile(times, 90),
        ratio=percentile(ratios, 50),
        quartiles={name: (low[name], high[name]) for name in ratios},
        facts=dict(facts or {}),
        costs=dict(costs or {}),
    )


def comparison_table(title: str, comparisons: Sequence[Comparison]) -> Table:
    """Times in milliseconds, relative to the subject, and, where they are known, tokens per second and caches."""
    counted = any("tokens" in c.facts for c in comparisons)
    cached = any("cache_bytes" in costs for c in comparisons for costs in c.costs.values())
    table = Table(title=title, caption="ratio: time relative to the first, by rounds", box=box.SIMPLE_HEAD)
    table.add_column("baseline", min_width=12)
    for column in ("p50 ms", "p90 ms", *["tokens/s"] * counted, *["cache MiB"] * cached, "ratio", "quartiles"):
        table.add_column(column, justify="right", no_wrap=True)
    for c in comparisons:
        table.add_row(f"[bold]{c.case}[/bold]")
        for name in c.seconds:
            low, high = c.quartiles[name]
            cells = [name, f"{1e3 * c.seconds[name]:.1f}", f"{1e3 * c.p90[name]:.1f}"]
            if counted:
                cells.append(f"{c.tokens_per_second[name]:,.0f}")
            if cached:
                cells.append(f"{c.costs[name]['cache_bytes'] / 2**20:,.2f}")
            table.add_row(*cells, f"{c.ratio[name]:.2f}", "" if name == c.subject else f"{low:.2f}-{high:.2f}")
        table.add_section()
    return table
