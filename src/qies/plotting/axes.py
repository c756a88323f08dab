"""Axis ranges and ticks, shared by both renderers: the range that the data need, and ticks few enough to read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# Share of the range that stays free on either side of the data.
MARGIN = 0.05


@dataclass(frozen=True)
class Scale:
    """A resolved axis from `low` to `high`; `ticks` maps values to labels, in order."""

    low: float
    high: float
    log: bool
    ticks: dict[float, str]

    def at(self, value: float) -> float:
        """Position of a value: 0 at the low end, 1 at the high end; NaN for what a log axis cannot show."""
        if not self.log:
            return (value - self.low) / (self.high - self.low)
        return math.log(value / self.low) / math.log(self.high / self.low) if value > 0 else math.nan


def make_scale(
    values: Iterable[float | None],
    log: bool,
    low: float | None,
    high: float | None,
    ticks: Mapping[float, str] | None,
    most: int,
) -> Scale:
    """The scale that holds every value it can show, with a margin; `low` and `high` fix an end as given.

    It has at most `most` ticks. Raises ValueError when neither the values nor the ends give a range.
    """
    shown = [v for v in values if v is not None and math.isfinite(v) and (v > 0 or not log)]
    if not shown and (low is None or high is None):
        raise ValueError("nothing to draw: no value that this axis can show")
    first, last = (min(shown), max(shown)) if shown else (0.0, 0.0)
    if log:
        span = math.log(last / first) if shown else 0.0
        pad = math.exp(MARGIN * span if span > 1e-9 else MARGIN)
        ends = first / pad, last * pad
    else:
        span = last - first
        pad = MARGIN * span if span > 1e-12 * abs(last) else MARGIN * (abs(last) or 1.0)
        ends = first - pad, last + pad
    low, high = ends[0] if low is None else low, ends[1] if high is None else high
    if not (low < high and (low > 0 or not log)):
        raise ValueError(f"an axis from {low:g} to {high:g} cannot be drawn")
    if ticks is None:
        ticks = log_ticks(low, high, most) if log else linear_ticks(low, high, most)
    return Scale(low, high, log, {v: text for v, text in ticks.items() if low <= v <= high})


def linear_ticks(low: float, high: float, most: int = 7) -> dict[float, str]:
    """At most `most` (>= 2) multiples of 1, 2 or 5 times a power of ten, with as many digits as their step needs."""
    from matplotlib.ticker import MaxNLocator

    for intervals in range(most + 1, 0, -1):
        every = MaxNLocator(intervals, steps=[1, 2, 5, 10]).tick_values(low, high)
        step = float(every[1] - every[0])
        places = max(0, -math.floor(math.log10(step) + 1e-9))
        near = 1e-9 * step
        values = [round(float(v), places + 3) for v in every if low - near <= v <= high + near]
        if len(values) <= most:
            break
    if max(map(abs, values), default=0.0) >= 1e4:
        return {v: si(v, 6) for v in values}
    return {v: f"{v:.{places}f}" for v in values}


def log_ticks(low: float, high: float, most: int = 7) -> dict[float, str]:
    """At most `most` ticks: linear ones within a factor of 7; else 1, 2, 5 or 1, 3 in each decade, or powers of ten."""
    from matplotlib.ticker import LogLocator

    if high < 7 * low:
        return linear_ticks(low, high, most)
    decades = math.ceil(math.log10(high / low)) + 2
    tries = [((1, 2, 5), decades), ((1, 3), decades), *(((1,), numticks) for numticks in range(decades, 0, -1))]
    for subs, numticks in tries:
        found = LogLocator(subs=subs, numticks=numticks).tick_values(low, high)
        values = [v for v in (float(f"{v:.6g}") for v in found) if low <= v <= high]
        if len(values) <= most:
            break
    return {v: si(v, 6) for v in values}


def si(value: float, significant: int = 3) -> str:
    """A number with an SI letter: 50k, 2.4M, 1.2G, 3.1T; powers of ten beyond."""
    value = float(f"{value:.{significant}g}")
    for power, letter in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if 10**power <= abs(value) < 10 ** (power + 3):
            return f"{value / 10**power:.{max(significant, 3)}g}{letter}"
    return f"{value:.{max(significant, 3)}g}".replace("e+", "e")
