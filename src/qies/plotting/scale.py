"""Axes: the range that data ask for, where a value lies in it, and ticks few enough to read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# Share of the range that stays free on either side of the data.
MARGIN = 0.05


@dataclass(frozen=True)
class Scale:
    """A resolved axis from `low` to `high`; `ticks` are values and their labels, in order."""

    low: float
    high: float
    log: bool
    ticks: dict[float, str]

    def at(self, value: float) -> float:
        """0 at the low end, 1 at the high end, beyond them outside; NaN for what a log axis cannot show."""
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

    `most` ticks at the most. Raises ValueError when neither the values nor the ends give a range.
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
    """At most `most` (>= 2) multiples of a round step, with as many digits as the step needs."""
    unit = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20):
        step = factor * unit
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            break
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    values = [round(i * step, 12 + places) for i in range(first, last + 1)]
    if max(map(abs, values), default=0.0) >= 1e4:
        return {v: si(v, 6) for v in values}
    return {v: f"{v:.{places}f}" for v in values}


def log_ticks(low: float, high: float, most: int = 7) -> dict[float, str]:
    """At most `most` ticks: even steps over a small range, else 1, 2, 5; 1, 3 or powers of ten in each decade."""
    if high < 7 * low:
        return linear_ticks(low, high, most)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = 1
    for factors in ((1, 2, 5), (1, 3), (1,)):
        values = [float(f"{f}e{p}") for p in powers for f in factors if low <= float(f"{f}e{p}") <= high]
        if len(values) <= most:
            break
    while len(values) > most:
        every += 1
        values = [v for p in powers if p % every == 0 and low <= (v := float(f"1e{p}")) <= high]
    return {v: si(v, 6) for v in values}


def si(value: float, significant: int = 3) -> str:
    """50k, 2.4M, 1.2G, 3.1T: some digits and a letter; powers of ten beyond."""
    value = float(f"{value:.{significant}g}")
    for power, letter in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if 10**power <= abs(value) < 10 ** (power + 3):
            return f"{value / 10**power:.{max(significant, 3)}g}{letter}"
    return f"{value:.{max(significant, 3)}g}".replace("e+", "e")
