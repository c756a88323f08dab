"""Two laws fitted to two arms, what their difference is known to, and where they meet.

Legend: p parameters of a law; k inputs of a law (1: log x; 2: log N, log D); cells: distinct (size, tokens)
points of an arm, each the mean of log loss over its seeds.

The arms see the same tokens in the same order, so what moves one arm's loss at a point moves the other's too.
The two laws are therefore treated as seemingly unrelated regressions (Zellner 1962): each is fitted by
itself, and the covariance of the residuals at matched cells gives the covariance between the two fits. Noise
that the arms share cancels from every difference. Student's t has as many degrees of freedom as the arm with
fewer cells has left; for matched designs and laws linear in their parameters this is exact.

A multiplier g solves L_A(x) = L_B(g x). Its interval is every g at which the two sides are not significantly
different (Fieller 1954): it is right where the delta method is not, near the baseline's floor, and says
"unbounded" where the data do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from qies.scaling.intervals import ROUNDING, reach

Array = NDArray[np.float64]
Rows = NDArray[np.int64]
Evaluate = Callable[[Array, Array], tuple[Array, Array]]
Path = Callable[[Array], Array]

LIMIT = math.log(1e4)  # multipliers beyond are not told apart from "never"
STEP = 0.02  # of the search for an interval's end, in log g: 2 %


@dataclass(frozen=True)
class Law:
    """log loss = evaluate(theta, x) at x [n, k], fitted to an arm's cells.

    `jacobian` [cells, p] and `residual` [cells] (observed minus fitted log loss) are those at the cells;
    `low`, `high` [k] the range of the cells' x.
    """

    evaluate: Evaluate
    names: tuple[str, ...]
    theta: Array
    x: Array
    jacobian: Array
    residual: Array

    @property
    def dof(self) -> int:
        return len(self.residual) - len(self.theta)

    def natural(self, theta: Array) -> dict[str, float]:
        """theta by name in the loss's units: an entry "log A" becomes "A"."""
        pairs = zip(self.names, theta, strict=True)
        return {name.removeprefix("log "): float(np.exp(v) if name.startswith("log ") else v) for name, v in pairs}

    def reach(self, x: Array) -> Array:
        """[n]: how many times beyond the cells x [n, k] lies; 1 inside."""
        return reach(x, self.x)


def make_law(evaluate: Evaluate, names: tuple[str, ...], theta: Array, x: Array, log_loss: Array) -> Law:
    fitted, jacobian = evaluate(theta, x)
    return Law(evaluate, names, theta, x, jacobian, log_loss - fitted)


@dataclass(frozen=True)
class Joint:
    """Both arms' laws, the 2 x 2 covariance of their residuals, that of (theta_A, theta_B) [2p, 2p], and dof."""

    a: Law
    b: Law
    sigma: Array
    covariance: Array
    dof: int
    level: float
    basis: str

    @property
    def quantile(self) -> float:
        """Student's t of a two-sided interval; infinite without degrees of freedom."""
        return float(student.ppf(0.5 + self.level / 2, self.dof)) if self.dof > 0 else math.inf

    def difference(self, xa: Array, xb: Array) -> tuple[Array, Array]:
        """log L_A(xa) - log L_B(xb) at [n, k] each, and its standard error."""
        fa, ja = self.a.evaluate(self.a.theta, xa)
        fb, jb = self.b.evaluate(self.b.theta, xb)
        gradient = np.concatenate([ja, -jb], axis=1)
        variance = np.einsum("ni,ij,nj->n", gradient, self.covariance, gradient)
        return fa - fb, np.sqrt(np.maximum(variance, 0.0))

    def band(self, arm: str, x: Array) -> tuple[Array, Array, Array]:
        """Loss of arm "a" or "b" at x [n, k] with its interval: (loss, lo, hi); NaN ends without dof."""
        law, block = (self.a, slice(0, len(self.a.theta))) if arm == "a" else (self.b, slice(len(self.a.theta), None))
        value, jacobian = law.evaluate(law.theta, x)
        variance = np.einsum("ni,ij,nj->n", jacobian, self.covariance[block, block], jacobian)
        half = (self.quantile if self.dof > 0 else math.nan) * np.sqrt(np.maximum(variance, 0.0))
        return np.exp(value), np.exp(value - half), np.exp(value + half)


def join(a: Law, b: Law, matched: Rows, level: float, seeds: tuple[Array, int] | None = None) -> Joint:
    """Both laws with their covariance. `matched` [m, 2] integer: row of a's cell, row of b's.

    `seeds`: (covariance 2 x 2 of cell means over seeds, its degrees of freedom), taken where the laws pass
    through every cell and leave no residual to measure noise with.
    """
    dof, basis = min(a.dof, b.dof), "cells"
    if dof > 0:
        cross = float(a.residual[matched[:, 0]] @ b.residual[matched[:, 1]]) / dof if len(matched) > dof else 0.0
        own = [float(law.residual @ law.residual) / law.dof for law in (a, b)]
        sigma = _covariance(own[0], own[1], cross)
    elif seeds is not None:
        (sigma, dof), basis = seeds, "seeds"
    else:
        sigma, dof, basis = np.full((2, 2), np.nan), 0, "none"
    pa, pb = _pseudo_inverse(a.jacobian), _pseudo_inverse(b.jacobian)
    between = sigma[0, 1] * pa[:, matched[:, 0]] @ pb[:, matched[:, 1]].T
    covariance = np.block([[sigma[0, 0] * pa @ pa.T, between], [between.T, sigma[1, 1] * pb @ pb.T]])
    return Joint(a, b, sigma, covariance, dof, level, basis)


def _covariance(aa: float, bb: float, ab: float) -> Array:
    """The 2 x 2 covariance; with few matched cells the cross term can come out larger than a covariance may."""
    limit = math.sqrt(aa * bb)
    return np.array([[aa, np.clip(ab, -limit, limit)], [np.clip(ab, -limit, limit), bb]])


def _pseudo_inverse(jacobian: Array) -> Array:
    """[p, cells]; columns are scaled first, so that a parameter's unit does not decide what is singular."""
    scale = np.linalg.norm(jacobian, axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    return np.linalg.pinv(jacobian / scale, rcond=1e-12) / scale[:, None]


def multipliers(joint: Joint, path_a: Path, path_b: Path, x: Array) -> tuple[Array, Array, Array]:
    """g with L_A(path_a(x)) = L_B(path_b(log g + x)) at log x [n], and its interval: (g, lo, hi).

    A path takes logs [n] to inputs [n, k]. g is NaN where none within 1e-4 to 1e4 does it: the baseline's floor lies
    above A's loss, say, and then hi is inf, and lo the g below which the baseline is significantly worse. lo = 0 and
    hi = inf where that end is unbounded.
    """
    target = path_a(x)

    def gap(log_g: Array) -> tuple[Array, Array]:
        return joint.difference(target, path_b(x + log_g))

    full = np.full(len(x), LIMIT)
    now = gap(np.zeros(len(x)))[0]
    root = np.where(np.abs(now) < ROUNDING, 0.0, bisect(lambda v: gap(v)[0], -full, full))
    if joint.dof == 0:
        return np.exp(root), np.full(len(x), np.nan), np.full(len(x), np.nan)
    t = joint.quantile
    start = np.where(np.isnan(root), -np.sign(now) * LIMIT, root)

    def beyond(log_g: Array, sign: int) -> Array:
        """Positive where L_A(x) is significantly above (+1) or below (-1) the baseline's loss at g x."""
        difference, error = gap(log_g)
        return sign * difference - t * error

    hi = _first_positive(lambda v: beyond(v, +1), start, STEP)
    lo = _first_positive(lambda v: beyond(v, -1), start, -STEP)
    lo, hi = np.where(np.isnan(lo), 0.0, np.exp(lo)), np.where(np.isnan(hi), np.inf, np.exp(hi))
    g = np.exp(root)
    return g, np.fmin(lo, g), np.fmax(hi, g)


def bisect(f: Callable[[Array], Array], low: Array, high: Array) -> Array:
    """Elementwise root of f between low and high [n]; NaN where f does not change sign there."""
    at_low = f(low)
    valid = np.sign(at_low) * np.sign(f(high)) <= 0
    low, high = low.copy(), high.copy()
    for _ in range(60):
        middle = (low + high) / 2
        same = np.sign(f(middle)) == np.sign(at_low)
        low, high = np.where(same, middle, low), np.where(same, high, middle)
    return np.where(valid, (low + high) / 2, np.nan)


def _first_positive(f: Callable[[Array], Array], start: Array, step: float) -> Array:
    """Where f first becomes positive on the way from `start` [n] by `step`; NaN where not within LIMIT of zero."""
    low, high, found = start.copy(), start.copy(), f(start) > 0
    for i in range(1, int(2 * LIMIT / abs(step))):
        v = start + i * step
        now = ~found & (f(v) > 0)
        low, high = np.where(now, v - step, low), np.where(now, v, high)
        found |= now
        if found.all():
            break
    end = np.where(low == high, start, bisect(f, low, high))
    return np.where(found & (np.abs(end) <= LIMIT), end, np.nan)


def crossings(
    joint: Joint, path_a: Path, path_b: Path, low: float, high: float
) -> list[tuple[float, float | None, float | None, int]]:
    """Every log x in [low, high] where the arms' losses are equal: (x, lo, hi, sign).

    lo, hi bound the x around it at which the losses are not significantly different, None where that holds
    to the end of the range (or no interval exists). sign -1: A is the lower beyond it; +1: B is.
    """
    grid = np.linspace(low, high, 1 + math.ceil((high - low) / 0.02))
    gap, error = joint.difference(path_a(grid), path_b(grid))
    if np.abs(gap).max() < ROUNDING:  # one law, not two that cross
        return []
    unclear = np.abs(gap) <= joint.quantile * error if joint.dof else np.ones(len(grid), bool)
    out: list[tuple[float, float | None, float | None, int]] = []
    for i in np.flatnonzero(np.sign(gap[:-1]) * np.sign(gap[1:]) < 0):
        root = bisect(lambda v: joint.difference(path_a(v), path_b(v))[0], grid[i : i + 1], grid[i + 1 : i + 2])
        left, right = i, i + 1
        while left >= 0 and unclear[left]:
            left -= 1
        while right < len(grid) and unclear[right]:
            right += 1
        lo = min(float(grid[left + 1]), float(root[0])) if left >= 0 else None
        hi = max(float(grid[right - 1]), float(root[0])) if right < len(grid) else None
        out.append((float(root[0]), lo, hi, int(np.sign(gap[i + 1]))))
    return out
