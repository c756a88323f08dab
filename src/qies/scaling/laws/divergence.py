"""Valid runs: those that finished, have finite numbers and did not diverge.

Divergence is sudden. Where loss rises over the grid (models too large for their tokens, data repeated too often), the
neighbours of a point rise as well, and it is kept.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from qies.scaling.laws.surface import fit_surface
from qies.scaling.tables.filtering import SWEEP_ROWS, cells_of_arms, members, unusable
from qies.scaling.tables.runs import Dropped, Runs

Array = NDArray[np.float64]

# A diverged run lies above the law by more than any noise: by 10 robust standard deviations of its arm's
# residuals of log loss, and by more than a quarter (a table of good runs at an odd place of the grid does less).
DIVERGED_SIGMAS, DIVERGED_LEAST = 10.0, math.log(1.25)
MOST_DIVERGED = 0.2  # of an arm's runs: where more stand out, that is their noise
FEWEST_FOR_A_SURFACE, FEWEST_FOR_A_LINE = 10, 5
# Where the neighbours of a point rise as well, it may rise by this many times as much.
STEEPER = 3.0
NEIGHBOURS = 12  # nearest cells, of which two must share a rise: one could have diverged as well
# What cells that rise together may rise by, in addition to the quarter (data repeated often, against new tokens).
TOGETHER = math.log(1.2)


def sound(runs: Runs, *, against_fit: bool = True) -> tuple[Runs, list[Dropped]]:
    """The valid runs, and the excluded ones with the reason.

    Excluded are runs that did not finish (by `status`), whose N, D, C or L is not finite or not positive, and, with
    `against_fit`, diverged ones: loss 25 % above that of its seeds, or of runs of the arm with no more parameters
    and tokens; and log loss far above a robust fit of the rest (approach 3 from 10 cells on, a Theil-Sen line in log C
    from 5 runs on). "Far" is 10 scaled MADs of the residuals and at least 25 %. Runs whose neighbours in N and D rise
    as well are kept, and of a hyperparameter sweep at one (N, D) only the best run is looked at.
    """
    reasons = unusable(runs)
    if against_fit:
        for arm in runs.arms:
            index = np.array([i for i in range(len(runs)) if i not in reasons and runs.arm[i] == arm], dtype=int)
            index = index[_comparable(runs.select(index))]
            above = _above_smaller(runs.select(index))
            reasons |= _diverged(index, above, DIVERGED_LEAST, "that of runs with no more parameters and tokens")
            index = index[above <= DIVERGED_LEAST]
            excess = _excess(runs.select(index))
            scale = 1.4826 * float(np.median(np.abs(excess - np.median(excess)))) if len(excess) else 0.0
            most = np.maximum(DIVERGED_SIGMAS * scale, DIVERGED_LEAST) + _around(runs.select(index), excess)
            reasons |= _diverged(index, excess, most, "the law of its arm")
    keep = np.array([i not in reasons for i in range(len(runs))], dtype=bool)
    return runs.select(keep), [Dropped(i, runs.name[i], reasons[i]) for i in sorted(reasons)]


def _comparable(runs: Runs) -> NDArray[np.bool_]:
    """[n] False for all but the best run of a cell that holds a sweep: SWEEP_ROWS times as many rows as seeds."""
    keep = np.ones(len(runs), dtype=bool)
    _, cell = cells_of_arms(runs)
    for rows in members(cell):
        if len(rows) >= SWEEP_ROWS * len(set(runs.seed[rows].tolist())):
            keep[rows] = rows == rows[np.argmin(runs.loss[rows])]
    return keep


def _diverged(index: NDArray[np.int_], above: Array, most: Array | float, what: str) -> dict[int, str]:
    """The reason for each run of `index` whose log loss is by more than `most` above `what`."""
    return {
        int(i): f"diverged: loss {100 * math.expm1(much):.0f} % above {what}"
        for i, much, limit in zip(index, above, np.broadcast_to(most, above.shape), strict=True)
        if much > limit
    }


def _above_smaller(runs: Runs) -> Array:
    """log loss above the median of its seeds, from three on, and above the lowest of runs of no more N and D, [n].

    More parameters and tokens make no run suddenly worse, whatever the law. Where the loss already rises at the nearest
    of those runs, STEEPER times that is taken off, or what all neighbours rise by, up to TOGETHER. A cell that more
    cells stand above than any of those stands above is itself too low, and shows nothing. Where more than a fifth of
    the runs stand out, it is noise.
    """
    y = np.log(runs.loss)
    points, of = cells_of_arms(runs)
    cells, rows_of = points[:, 1:], members(of)
    median = np.array([np.median(y[rows]) for rows in rows_of])

    def smaller(c: int) -> NDArray[np.bool_]:  # a row at a time: a table of whole curves has many thousand cells
        return (cells <= cells[c]).all(1) & (np.arange(len(cells)) != c)

    over = [np.flatnonzero(smaller(c) & (median[c] - median > DIVERGED_LEAST)) for c in range(len(cells))]
    below, most = np.zeros(len(cells)), np.zeros(len(cells))
    for under in over:
        below[under] += 1
        most[under] = np.maximum(most[under], len(under))
    low = below > most
    x = _scaled(cells)
    least = np.array([median[smaller(c) & ~low].min(initial=np.inf) for c in range(len(cells))])
    climb = np.where(np.isfinite(least), median - least, 0.0)
    found, rise = np.empty(len(y)), np.zeros(len(cells))
    for c in np.argsort(cells.prod(axis=1), kind="stable"):  # every cell after those that are smaller
        before = STEEPER * _shared(x, c, np.where(smaller(c), rise, -np.inf)) if climb[c] > 0 else 0.0
        together = min(_shared(x, c, climb), TOGETHER) if climb[c] > DIVERGED_LEAST else 0.0
        allowed = max(before, together)
        seeds = median[c] if len(rows_of[c]) > 2 else np.inf
        found[rows_of[c]] = y[rows_of[c]] - np.minimum(seeds, least[c] + allowed)
        rise[c] = climb[c] if 0 < climb[c] <= DIVERGED_LEAST + allowed else 0.0
    return np.full(len(y), -np.inf) if (found > DIVERGED_LEAST).sum() > MOST_DIVERGED * len(y) else found


def _around(runs: Runs, excess: Array) -> Array:
    """What the excess of the nearest cells allows each run that may have diverged, [n]; 0 for the others."""
    points, of = cells_of_arms(runs)
    typical = np.array([np.median(excess[rows]) for rows in members(of)])
    x, allowed = _scaled(points[:, 1:]), np.zeros(len(runs))
    for i in np.flatnonzero(excess > DIVERGED_LEAST):
        allowed[i] = STEEPER * _shared(x, of[i], typical)
    return allowed


def _scaled(cells: Array) -> Array:
    """log of cells' N, D and unique tokens [n, 2 or 3] over the range that each has."""
    x = np.log(cells)
    spread = np.ptp(x, axis=0) if len(x) else np.zeros(x.shape[1])
    return x / np.where(spread > 0, spread, 1.0)


def _shared(x: Array, cell: int, rise: Array) -> float:
    """What two of the cells nearest to `cell` rise by; rise [cells] is -inf where a cell does not count."""
    distance = np.linalg.norm(x - x[cell], axis=1)
    distance[(rise == -np.inf) | (np.arange(len(x)) == cell)] = np.inf
    near = np.argsort(distance, kind="stable")[:NEIGHBOURS]
    near = near[np.isfinite(distance[near])]
    return max(float(np.sort(rise[near])[-2]), 0.0) if len(near) > 1 else 0.0


def _excess(runs: Runs) -> Array:
    """log loss above a robust law of the runs, [n]; zero where they are too few for one."""
    cells = set(zip(runs.params, runs.tokens, strict=True))
    both_vary = all(len(set(values)) > 1 for values in zip(*cells, strict=True))
    if len(cells) >= FEWEST_FOR_A_SURFACE and both_vary:
        fit = fit_surface(runs, "approach3")
        return np.log(runs.loss) - np.log(fit.predict(runs.params, runs.tokens))
    if len(runs) < FEWEST_FOR_A_LINE:
        return np.zeros(len(runs))
    x, y = np.log(runs.flops), np.log(runs.loss)
    i, j = np.triu_indices(len(x), 1)
    apart = x[i] != x[j]
    slope = float(np.median((y[i] - y[j])[apart] / (x[i] - x[j])[apart])) if apart.any() else 0.0
    return y - slope * x - np.median(y - slope * x)
