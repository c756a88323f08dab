"""Statistical power of the tests behind a verdict: how many further runs would detect the observed difference.

The effect is taken to be as large as the one seen, and the noise too; both are estimates, so the answer is a
plan, not a promise (a planned number of runs is not evidence about the arms).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2, norm
from scipy.stats import t as student

from qies.scaling.comparison.matching import Paired
from qies.scaling.result import plain, public_fields

TARGET = 0.8
MOST = 1000
NODES, WEIGHTS = np.polynomial.legendre.leggauss(100)


@dataclass(frozen=True)
class SizePower:
    """At one size and token budget: pairs of runs at hand and in all needed for a paired test; None: over 1,000.

    `sd` of the paired difference in nats; `measured` says whether seeds gave it or, with one seed, the scatter
    of the differences around the two laws stands in.
    """

    params: float
    tokens: float
    difference: float
    sd: float
    measured: bool
    have: int
    need: int | None


@dataclass(frozen=True)
class StatisticalPower:
    """`sizes`: what a paired test needs at each matched size. `cells` and `cells_needed`: matched (size, tokens)
    points at hand, and how many like them the gain's interval needs to exclude 1; None: over 1,000.
    `detectable`: the smallest gain (above 1) that the present runs would show at the largest shared compute.
    All at `level` two-sided and with probability `target`.
    """

    target: float
    level: float
    cells: int
    cells_needed: int | None
    detectable: float | None
    sizes: tuple[SizePower, ...]

    @property
    def best(self) -> SizePower | None:
        """The matched size that needs the fewest seeds, the smallest of equals; None where all need over 1,000."""
        known = [size for size in self.sizes if size.need is not None]
        return min(known, key=lambda size: size.need or 0, default=None)

    def to_dict(self) -> dict[str, Any]:
        return public_fields(self) | {"best": plain(self.best)}


def t_power(effect: float, error: float, dof: float, level: float) -> float:
    """Probability that a two-sided t test at `level` shows `effect` whose estimate has standard error `error`."""
    if dof < 1:
        return 0.0
    if error == 0:
        return float(effect != 0)
    scale, shift = _scales(dof, level), abs(effect) / error
    return float(WEIGHTS @ (norm.cdf(shift - scale) + norm.cdf(-shift - scale)) / 2)


@cache
def _scales(dof: float, level: float) -> NDArray[np.float64]:
    """Thresholds of the test in standard errors, at quantiles of the estimated scale (chi over sqrt(dof)).

    Given that scale the estimate is normal. scipy's noncentral t gives NaN far in the tails, where plans of many
    runs lie.
    """
    return np.sqrt(chi2.ppf((NODES + 1) / 2, dof) / dof) * student.ppf(0.5 + level / 2, dof)


def pairs_needed(effect: float, sd: float, level: float, target: float = TARGET) -> int | None:
    """Pairs of runs for a paired t test to show a mean difference `effect` of standard deviation `sd`."""
    return _smallest(lambda n: t_power(effect, sd / math.sqrt(n), n - 1, level) >= target, 2)


def cells_needed(
    effect: float, error: float, cells: int, dof: float, level: float, target: float = TARGET
) -> int | None:
    """Cells at which a contrast `effect`, now known to `error` from `cells` cells with `dof`, shows; the design
    is taken to be repeated, so that the error falls as 1 / sqrt(cells)."""
    p = cells - dof
    return _smallest(lambda n: t_power(effect, error * math.sqrt(cells / n), n - p, level) >= target, math.ceil(p) + 1)


def detectable_effect(error: float, dof: float, level: float, target: float = TARGET) -> float:
    """The effect that a t test with this standard error and dof shows with probability `target`."""
    low, high = 0.0, error
    while t_power(high, error, dof, level) < target:
        high *= 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if t_power(middle, error, dof, level) < target else (low, middle)
    return high


def size_power(paired: Sequence[Paired], scatter: float | None, level: float) -> tuple[SizePower, ...]:
    """What each matched size needs. `scatter`: of the differences around the laws, in log loss times the loss,
    nats; it stands in where there is one seed. Sizes with neither are left out."""
    out = []
    for row in paired:
        sd = row.sd if row.sd is not None else scatter
        if sd is None:
            continue
        need = pairs_needed(row.difference, sd, level) if row.difference else None
        out.append(SizePower(row.params, row.tokens, row.difference, sd, row.sd is not None, row.n, need))
    return tuple(out)


def _smallest(enough: Callable[[int], bool], start: int) -> int | None:
    """The smallest n in start..MOST with enough(n), which never turns false again; None if there is none."""
    if not enough(MOST):
        return None
    low, high = start - 1, MOST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
