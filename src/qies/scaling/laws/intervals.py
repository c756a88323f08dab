"""What fits share to state how sure they are: covariance, quantiles, condition number."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.stats import norm
from scipy.stats import t as student

Array = NDArray[np.float64]

# Of the Jacobian with unit columns: a step along the weakest combination of parameters then moves the losses
# a thousand times less than one along the strongest, so the data do not tell them apart.
ILL_CONDITIONED = 1e3
# Losses are stored to about 1e-9 at best: less scatter than that is rounding, not a measurement of noise.
ROUNDING = 1e-9
WINDOW = 0.8  # robust standard deviations over which the density of residuals at zero is taken


def condition_number(jacobian: Array) -> float:
    """Of the Jacobian [n, p] with unit columns; infinite when a parameter moves nothing."""
    lengths = np.linalg.norm(jacobian, axis=0)
    return float(np.linalg.cond(jacobian / lengths)) if (lengths > 0).all() else math.inf


def huber_covariance(jacobian: Array, residual: Array, delta: float) -> tuple[float, Array]:
    """Scale of log L, covariance [p, p] of a Huber estimate (Huber 1973); inside delta, of least squares.

    The share of residuals within delta stands for their density at zero. Where delta is far below the scatter the
    fit is nearly least absolute values: it passes through p points, and few others are within delta. The density is
    then taken over 0.8 robust standard deviations, where those p count half, as about half of them would lie there
    anyway. (By the share within delta alone, 95 % intervals cover about 60 % at 36 cells and delta 1e-3.)
    """
    inside, variance = huber_moments(residual, delta, jacobian.shape[1])
    scale = math.sqrt(variance) / inside
    inverse: Array = np.asarray(np.linalg.pinv(jacobian.T @ jacobian, rcond=1e-15), np.float64)
    return scale, scale**2 * inverse


def huber_moments(residual: Array, delta: float, p: int) -> tuple[float, float]:
    """Mean of rho'' (the share of errors within delta) and of rho'^2 over residuals [n] of a fit with p parameters."""
    n = len(residual)
    spread = 1.4826 * float(np.median(np.abs(residual))) * math.sqrt(n / (n - p))
    if delta >= WINDOW * spread:
        inside = max(float((np.abs(residual) <= delta).mean()), 1 / n)
    else:
        window = WINDOW * spread
        inside = max(int((np.abs(residual) <= window).sum()) - p / 2, 1) / (n - p / 2) * delta / window
    return inside, float((np.clip(residual, -delta, delta) ** 2).sum()) / (n - p)


def relative(weight: Array) -> Array:
    """Square roots of weights [n] of mean 1; with them intervals depend on ratios of weights alone."""
    return np.asarray(np.sqrt(weight / weight.mean()))


def stretched_percentiles(estimate: Array, draws: Array, level: float) -> tuple[Array, Array]:
    """Interval of estimate [...] from bootstrap draws [S, ...]: their one-sigma percentiles, stretched to `level`.

    Draws of a nearly least-absolute-values fit have the right spread and too heavy tails: plain 95 % percentiles of
    36 cells cover 97 to 100 %.
    """
    below, middle, above = np.quantile(draws, norm.cdf([-1.0, 0.0, 1.0]), axis=0)
    z = float(norm.ppf(0.5 + level / 2))
    return estimate - z * (middle - below), estimate + z * (above - middle)


def independent_groups(cell: NDArray[np.int64], run: Sequence[str]) -> NDArray[np.int64]:
    """Group of each row, [n], from 0: rows share one if they share a cell [n] or a run [n] ("" is none), directly or
    through others. Points of one training curve move together, and so do the seeds of one cell."""
    names = {name: i for i, name in enumerate(dict.fromkeys(r for r in run if r))}
    known = np.array([r != "" for r in run], dtype=bool)
    cells, nodes = int(cell.max()) + 1, int(cell.max()) + 1 + len(names)
    ends = cell[known], np.array([cells + names[r] for r in run if r], dtype=np.int64)
    graph = coo_matrix((np.ones(len(ends[0])), ends), shape=(nodes, nodes))
    return np.unique(connected_components(graph, directed=False)[1][cell], return_inverse=True)[1].astype(np.int64)


def resampled_counts(member: NDArray[np.int64], resample: str, draws: int, seed: int) -> Array:
    """How often each run counts in each draw, [draws, n]: whole groups ("runs"), or the seeds within each ("seeds").

    member: the group of each run, [n], from 0.
    """
    rng = np.random.default_rng(seed)
    cells = int(member.max()) + 1
    if resample == "runs":
        return rng.multinomial(cells, np.full(cells, 1 / cells), draws)[:, member].astype(np.float64)
    counts = np.zeros((draws, len(member)))
    for cell in range(cells):
        seeds = np.flatnonzero(member == cell)
        counts[:, seeds] = rng.multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), draws)
    return counts


def reach(x: Array, runs: Array) -> Array:
    """[n]: how many times beyond the range of the runs [m, k] the points x [n, k] lie, both logs; 1 inside.

    The worst of the k coordinates and of their sum: that of log N and log D is compute, in which isoFLOP runs end
    before they end in N and D.
    """
    points, known = (np.column_stack([v, v.sum(axis=1)]) for v in (x, runs))
    beyond = np.maximum(known.min(axis=0) - points, points - known.max(axis=0))
    return np.asarray(np.exp(np.maximum(beyond, 0.0).max(axis=1)))


def t_quantile(level: float, dof: float) -> float:
    return float(student.ppf(0.5 + level / 2, dof))


def bootstrap_tails(level: float, n: int, dof: int) -> tuple[float, float]:
    """Bootstrap percentiles that stand for `level`: Hesterberg 2015, with dof in place of his n - 1."""
    tail = float(norm.cdf(-math.sqrt(n / dof) * t_quantile(level, dof)))
    return tail, 1 - tail
