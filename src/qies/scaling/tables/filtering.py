"""Filters of a table that need no law: unusable runs, the best run of each cell, and what looks odd."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from qies.scaling.tables.runs import Runs

Array = NDArray[np.float64]

FINISHED = {"", "done", "finished", "completed", "complete", "ok", "success", "succeeded", "converged"}
# Rows of one cell and seed from which they are a sweep, whose best row alone is comparable.
SWEEP_ROWS = 5
# Spread (standard deviation of log loss in a cell) that seeds do not have.
SEED_SPREAD = 0.03


def unusable(runs: Runs) -> dict[int, str]:
    """Why a run cannot be used, by index: it did not finish, or a number is not finite and positive."""
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
    return reasons


def best_per_cell(runs: Runs) -> NDArray[np.int64]:
    """Indices, in order, of the run with the lowest loss at every arm's (N, D) and, where known, unique tokens."""
    _, cell = cells_of_arms(runs)
    order = np.lexsort((np.arange(len(runs)), runs.loss, cell))
    first = np.unique(cell[order], return_index=True)[1]
    return np.sort(order[first])


def cells_of_arms(runs: Runs) -> tuple[Array, NDArray[np.int64]]:
    """Distinct (arm number, N, D) [cells, 3] in order, and each run's cell [n]; with unique tokens, [cells, 4]."""
    columns = [np.array([runs.arms.index(a) for a in runs.arm], dtype=np.float64), runs.params, runs.tokens]
    if runs.unique is not None:
        columns.append(np.where(np.isnan(runs.unique), runs.tokens, runs.unique))
    points, cell = np.unique(np.stack(columns, 1), axis=0, return_inverse=True)
    return points, cell.reshape(-1)


def members(cell: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The rows of every cell."""
    order = np.argsort(cell, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(cell[order])) + 1) if len(cell) else []


# A guess over a million tokens costs ln 1e6 = 13.8 nats: a table whose median is above is in another unit.
MOST_NATS = 13.8
# Fewer parameters or tokens than any language model has: a count in thousands, millions or billions.
FEWEST_PARAMS, FEWEST_TOKENS = 1e4, 1e5
# FLOPs a token and parameter: 6, less or more by what embeddings, attention and inactive experts do.
FLOPS_RANGE = (0.3, 120.0)
# Token budgets a size from which rows that no run is named for look like points of training curves.
LIKE_CURVES = 8


def oddities(runs: Runs) -> list[str]:
    """Warnings about likely errors in the table and about rows that are not independent."""
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
    rows = list(zip(cells_of_arms(runs)[1], runs.seed, runs.loss, runs.run, strict=True))
    if repeats := len(rows) - len(set(rows)):
        said.append(f"{repeats} rows repeat another's arm, params, tokens, seed and loss, and count as further seeds")
    return [*runs.notes, *said, *_curves(runs)]


def _sweeps(runs: Runs) -> list[str]:
    """Whether rows of one arm, N and D are other than seeds of one configuration."""
    _, cell = cells_of_arms(runs)
    several = [rows for rows in members(cell) if len(set(runs.loss[rows].tolist())) > 1]
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
