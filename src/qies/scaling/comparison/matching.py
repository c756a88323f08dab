"""Runs of two arms brought together: cells (one size, one token budget), matched cells, paired tests.

Sizes and token budgets within 2 % are one level (`tables.levels`), over both arms together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from qies.scaling.result import public_fields
from qies.scaling.tables.runs import Runs
from qies.scaling.tables.size_levels import levels

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Cells:
    """An arm's cells: arrays [n]; `key` (level of size, of tokens and of unique tokens) and `runs` [n] of row numbers
    into the arm's runs.

    `log_loss` is the weighted mean of log loss; params, tokens, flops and seconds geometric means (NaN where
    a time is unknown).
    """

    key: list[tuple[int, int, int]]
    params: Array
    tokens: Array
    flops: Array
    seconds: Array
    log_loss: Array
    weight: Array
    runs: list[NDArray[np.int64]]

    def __len__(self) -> int:
        return len(self.key)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """[n] number of each cell's size, alike in both arms."""
        return np.array([size for size, _, _ in self.key], np.int64)


@dataclass(frozen=True)
class Paired:
    """The difference (candidate minus baseline, nats per token) at one size and token budget, over seeds.

    `n` differences went into `test`: "paired t" over seeds that both arms have, "Welch t" where they share
    fewer than two but each has two, "one seed" where neither can be done, "no spread" where seeds differ by nothing,
    which measures no noise (copies of a row, say): lo, hi, sd, p are then None.
    `flops_ratio`: the candidate's FLOPs over the baseline's.
    """

    params: float
    tokens: float
    difference: float
    lo: float | None
    hi: float | None
    p: float | None
    sd: float | None
    n: int
    test: str
    flops_ratio: float

    def to_dict(self) -> dict[str, Any]:
        return public_fields(self) | {"interval": None if self.lo is None else [self.lo, self.hi]}


def cells_of(a: Runs, b: Runs) -> tuple[Cells, Cells]:
    """The cells of both arms, numbered alike, by size and tokens. Runs with other unique tokens are other cells."""
    columns = [np.concatenate(pair) for pair in ((a.params, b.params), (a.tokens, b.tokens), (_unique(a), _unique(b)))]
    key, n = np.stack([levels(column) for column in columns], axis=1), len(a.params)
    return _cells(a, key[:n]), _cells(b, key[n:])


def _unique(runs: Runs) -> Array:
    """Unique tokens [n]: all where they are not known."""
    return runs.tokens if runs.unique is None else np.where(np.isnan(runs.unique), runs.tokens, runs.unique)


def _cells(runs: Runs, key: NDArray[np.int64]) -> Cells:
    keys = sorted((size, budget, unique) for size, budget, unique in {tuple(row) for row in key.tolist()})
    members = [np.flatnonzero((key == k).all(axis=1)) for k in keys]

    def mean(values: Array, logs: bool = True) -> Array:
        with np.errstate(invalid="ignore", divide="ignore"):
            v = np.log(values) if logs else values
            return np.array([np.average(v[m], weights=runs.weight[m]) for m in members])

    return Cells(
        key=keys,
        params=np.exp(mean(runs.params)),
        tokens=np.exp(mean(runs.tokens)),
        flops=np.exp(mean(runs.flops)),
        seconds=np.exp(mean(np.where(runs.wall_seconds > 0, runs.wall_seconds, np.nan))),
        log_loss=mean(runs.loss),
        weight=np.array([runs.weight[m].mean() for m in members]),
        runs=members,
    )


def match(a: Cells, b: Cells) -> NDArray[np.int64]:
    """[m, 2]: rows of a and b that are the same cell."""
    row = {key: i for i, key in enumerate(b.key)}
    return np.array([(i, row[key]) for i, key in enumerate(a.key) if key in row], np.int64).reshape(-1, 2)


def by_seed(a: Runs, b: Runs, in_a: NDArray[np.int64], in_b: NDArray[np.int64]) -> tuple[Array, Array]:
    """Losses [n], [n] of the seeds both arms have at a cell; none where a seed repeats in an arm, for then the numbers
    do not tell which run belongs to which."""
    left, right = (dict(zip(r.seed[i].tolist(), r.loss[i].tolist(), strict=True)) for r, i in ((a, in_a), (b, in_b)))
    if len(left) < len(in_a) or len(right) < len(in_b):
        return np.empty(0), np.empty(0)
    shared = [seed for seed in left if seed in right]
    return np.array([left[s] for s in shared]), np.array([right[s] for s in shared])


def paired_tests(a: Runs, b: Runs, ca: Cells, cb: Cells, level: float) -> tuple[Paired, ...]:
    """One test per matched cell, in order of size and tokens."""
    return tuple(_paired(a, b, ca, cb, int(i), int(j), level) for i, j in match(ca, cb))


def _paired(a: Runs, b: Runs, ca: Cells, cb: Cells, i: int, j: int, level: float) -> Paired:
    left, right = by_seed(a, b, ca.runs[i], cb.runs[j])
    if len(left) >= 2:
        d = left - right
        n, mean, sd, dof, test = len(d), float(d.mean()), float(d.std(ddof=1)), float(len(d) - 1), "paired t"
        error: float | None = sd / math.sqrt(n)
    else:
        left, right = a.loss[ca.runs[i]], b.loss[cb.runs[j]]
        mean, n = float(left.mean() - right.mean()), min(len(left), len(right))
        if n >= 2:
            va, vb = float(left.var(ddof=1)) / len(left), float(right.var(ddof=1)) / len(right)
            error, test = math.sqrt(va + vb), "Welch t"
            bottom = va**2 / (len(left) - 1) + vb**2 / (len(right) - 1)
            dof = (va + vb) ** 2 / bottom if bottom > 0 else float(len(left) + len(right) - 2)
            sd = math.sqrt(va * len(left) + vb * len(right))
        else:
            error, sd, dof, test = None, math.nan, 0.0, "one seed"
    if error == 0 and mean != 0:
        error, test = None, "no spread"
    lo = hi = p = None
    if error is not None:
        half = float(student.ppf(0.5 + level / 2, dof)) * error
        lo, hi = mean - half, mean + half
        p = float(2 * student.sf(abs(mean) / error, dof)) if error > 0 else 1.0
    return Paired(
        params=float(math.sqrt(ca.params[i] * cb.params[j])),
        tokens=float(math.sqrt(ca.tokens[i] * cb.tokens[j])),
        difference=mean,
        lo=lo,
        hi=hi,
        p=p,
        sd=None if error is None else sd,
        n=n,
        test=test,
        flops_ratio=float(ca.flops[i] / cb.flops[j]),
    )


def seed_noise(a: Runs, b: Runs, ca: Cells, cb: Cells) -> tuple[Array, int] | None:
    """Covariance 2 x 2 of the arms' cell means of log loss over seeds, pooled over matched cells, and its dof.

    Of the seeds both arms have; None where no cell has two of them.
    """
    total, dof, inverse = np.zeros((2, 2)), 0, []
    for i, j in match(ca, cb):
        left, right = by_seed(a, b, ca.runs[i], cb.runs[j])
        if len(left) < 2:
            continue
        y = np.log(np.stack([left, right]))
        y -= y.mean(axis=1, keepdims=True)
        total, dof = total + y @ y.T, dof + y.shape[1] - 1
        inverse.append(1 / y.shape[1])
    return (total / dof * float(np.mean(inverse)), dof) if dof else None
