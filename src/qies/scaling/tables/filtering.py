"""Which runs to trust: what did not finish or diverged is named and left out, what looks odd is said."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from qies.scaling.laws.surface import fit_surface
from qies.scaling.tables.runs import Dropped, Runs

Array = NDArray[np.float64]

FINISHED = {"", "done", "finished", "completed", "complete", "ok", "success", "succeeded", "converged"}
# A diverged run lies above the law by more than any noise: by 10 robust standard deviations of its arm's
# residuals of log loss, and by more than a quarter (a table of good runs at an odd place of the grid does less).
DIVERGED_SIGMAS, DIVERGED_LEAST = 10.0, math.log(1.25)
MOST_DIVERGED = 0.2  # of an arm's runs: where more stand out, that is their noise
FEWEST_FOR_A_SURFACE, FEWEST_FOR_A_LINE = 10, 5
# Divergence is sudden. Where loss rises over the grid (models too large for their tokens, data repeated too often) a
# point's neighbours rise too, and it may rise by so many times as much.
STEEPER = 3.0
NEIGHBOURS = 12  # nearest cells, of which two must share a rise: one could have diverged as well
# What cells that rise together may rise by, besides the quarter (data repeated often, beside as many new tokens).
TOGETHER = math.log(1.2)
# Rows of one cell and seed from which they are a sweep, whose best row alone is comparable.
SWEEP_ROWS = 5
# Spread (standard deviation of log loss in a cell) that seeds do not have.
SEED_SPREAD = 0.03


def sound(runs: Runs, *, against_fit: bool = True) -> tuple[Runs, list[Dropped]]:
    """The runs to trust, and the others with the reason.

    Left out are runs that did not finish (by `status`), whose N, D, C or L is not finite or not positive, and, with
    `against_fit`, diverged ones: loss 25 % above that of its seeds, or of runs of the arm with no more parameters
    and tokens; and log loss far above a robust fit of the rest (approach 3 from 10 cells on, a Theil-Sen line in log C
    from 5 runs on). "Far" is 10 scaled MADs of the residuals and at least 25 %. Runs whose neighbours in N and D rise
    as well are kept, and of a hyperparameter sweep at one (N, D) only the best run is looked at.
    """
    reasons: dict[int, str] = {}
    for i in range(len(runs)):
        if runs.status[i].lower() not in FINISHED:
            reasons[i] = f"status {runs.status[i]}"
            continue
        for what in ("loss", "params", "tokens", "flops", "weight"):
            value = float(getattr(runs, what)[i])
            if not (math.isfinite(value) and value > 0):
                reasons[i] = f"{what} is {value:g}"
                break
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


def best_per_cell(runs: Runs) -> NDArray[np.int64]:
    """Indices, in order, of the run with the lowest loss at every arm's (N, D) and, where known, unique tokens."""
    _, cell = _cells(runs)
    order = np.lexsort((np.arange(len(runs)), runs.loss, cell))
    first = np.unique(cell[order], return_index=True)[1]
    return np.sort(order[first])


def _cells(runs: Runs) -> tuple[Array, NDArray[np.int64]]:
    """Distinct (arm number, N, D) [cells, 3] in order, and each run's cell [n]; with unique tokens, [cells, 4]."""
    columns = [np.array([runs.arms.index(a) for a in runs.arm], dtype=np.float64), runs.params, runs.tokens]
    if runs.unique is not None:
        columns.append(np.where(np.isnan(runs.unique), runs.tokens, runs.unique))
    points, cell = np.unique(np.stack(columns, 1), axis=0, return_inverse=True)
    return points, cell.reshape(-1)


def _comparable(runs: Runs) -> NDArray[np.bool_]:
    """[n] False for all but the best run of a cell that holds a sweep: SWEEP_ROWS times as many rows as seeds."""
    keep = np.ones(len(runs), dtype=bool)
    _, cell = _cells(runs)
    for rows in _members(cell):
        if len(rows) >= SWEEP_ROWS * len(set(runs.seed[rows].tolist())):
            keep[rows] = rows == rows[np.argmin(runs.loss[rows])]
    return keep


def _members(cell: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The rows of every cell."""
    order = np.argsort(cell, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(cell[order])) + 1) if len(cell) else []


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
    points, of = _cells(runs)
    cells, members = points[:, 1:], _members(of)
    median = np.array([np.median(y[rows]) for rows in members])

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
        seeds = median[c] if len(members[c]) > 2 else np.inf
        found[members[c]] = y[members[c]] - np.minimum(seeds, least[c] + allowed)
        rise[c] = climb[c] if 0 < climb[c] <= DIVERGED_LEAST + allowed else 0.0
    return np.full(len(y), -np.inf) if (found > DIVERGED_LEAST).sum() > MOST_DIVERGED * len(y) else found


def _around(runs: Runs, excess: Array) -> Array:
    """What the excess of the nearest cells allows each run that may have diverged, [n]; 0 for the others."""
    points, of = _cells(runs)
    typical = np.array([np.median(excess[rows]) for rows in _members(of)])
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


# A guess over a million tokens costs ln 1e6 = 13.8 nats: a table whose median is above is in another unit.
MOST_NATS = 13.8
# Fewer parameters or tokens than any language model has: a count in thousands, millions or billions.
FEWEST_PARAMS, FEWEST_TOKENS = 1e4, 1e5
# FLOPs a token and parameter: 6, less or more by what embeddings, attention and inactive experts do.
FLOPS_RANGE = (0.3, 120.0)
# Token budgets a size from which rows that no run is named for look like points of training curves.
LIKE_CURVES = 8


def oddities(runs: Runs) -> list[str]:
    """Plain sentences on what looks like a slip in the table, or like rows that are not independent of each other."""
    if not len(runs):
        return []
    said = []
    median = float(np.median(runs.loss))
    if median > MOST_NATS:
        said.append(
            f"the median loss is {median:.3g}, more than uniform guessing costs in nats per token: it may be a "
            "perplexity"
        )
    for what, least in (("params", FEWEST_PARAMS), ("tokens", FEWEST_TOKENS)):
        most = float(getattr(runs, what).max())
        if most < least:
            said.append(
                f"no run has more than {most:.3g} {what}: if the column counts millions or billions, give "
                f"--columns {what}=COLUMN*1e6 or *1e9"
            )
    share = float(np.median(runs.flops / (runs.params * runs.tokens)))
    if not said and not FLOPS_RANGE[0] <= share <= FLOPS_RANGE[1]:
        said.append(f"FLOPs are {share:.2g} times params times tokens, where 6 is usual: check the units of all three")
    said += _sweeps(runs)
    rows = list(zip(_cells(runs)[1], runs.seed, runs.loss, runs.run, strict=True))
    if repeats := len(rows) - len(set(rows)):
        said.append(f"{repeats} rows repeat another's arm, params, tokens, seed and loss, and count as further seeds")
    return [*runs.notes, *said, *_curves(runs)]


def _sweeps(runs: Runs) -> list[str]:
    """Whether rows of one arm, N and D are other than seeds of one configuration."""
    _, cell = _cells(runs)
    several = [rows for rows in _members(cell) if len(set(runs.loss[rows].tolist())) > 1]
    settings = _varying(runs, several)
    differ = f" and differ in {', '.join(settings)}" if settings else ""
    best = "if they are a sweep of hyperparameters, take the best of each with --best-per-cell"
    alike = sum(len(set(runs.seed[rows].tolist())) < len(rows) for rows in several)
    if alike and not any(runs.run):
        return [
            f"at {alike} (N, D) several rows have one seed{differ}, and count as further seeds: {best}; if they are "
            "seeds, name their column with --columns seed=COLUMN"
        ]
    if settings:
        return [f"rows of one (N, D) differ in {', '.join(settings)}, and count as further seeds: {best}"]
    spread = [float(np.log(runs.loss[rows]).std(ddof=1)) for rows in several]
    if spread and (wide := float(np.median(spread))) > SEED_SPREAD:
        return [f"rows of one (N, D) differ by {100 * wide:.0f} %, more than seeds do: {best}"]
    return []


def _varying(runs: Runs, cells: list[NDArray[np.int64]]) -> list[str]:
    """The columns of settings that vary inside a cell, in quotes; without those that only number the seeds."""
    found = []
    for name, values in runs.settings.items():
        inside = any(len({values[i] for i in rows}) > 1 for rows in cells)
        numbers_seeds = len(set(zip(runs.seed.tolist(), values, strict=True))) == len(set(runs.seed.tolist()))
        if inside and not numbers_seeds:
            found.append(f"'{name}'")
    return found


def _curves(runs: Runs) -> list[str]:
    """Whether rows are points of training curves."""
    runs_named = len({r for r in runs.run if r}) + sum(not r for r in runs.run)
    if runs_named < len(runs):
        return [
            f"the rows are points of {runs_named} training curves, and those of one curve are not independent: a "
            "bootstrap of runs resamples whole curves; t intervals, tests and likelihoods take every point for a run"
        ]
    if any(runs.run):
        return []
    budgets: dict[tuple[str, float, int], set[float]] = {}
    for arm, n, seed, d in zip(runs.arm, runs.params, runs.seed, runs.tokens, strict=True):
        budgets.setdefault((arm, float(n), int(seed)), set()).add(float(d))
    mean = float(np.mean([len(b) for b in budgets.values()]))
    if mean < LIKE_CURVES:
        return []
    return [
        f"every size has {mean:.2g} token counts on average: if they are points of one training curve, they are not "
        "independent; name the run of each row with --columns run=COLUMN, and intervals resample whole runs"
    ]
