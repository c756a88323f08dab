"""Two laws fitted to two arms, what their difference is known to, and where they meet.

Legend: p parameters of a law; k inputs of a law (1: log x; 2: log N, log D); cells: distinct (size, tokens)
points of an arm, each the mean of log loss over its seeds.

The arms see the same tokens in the same order, so what moves one arm's loss at a point moves the other's too.
The two laws are therefore treated as seemingly unrelated regressions (Zellner 1962): each is fitted by
itself, and the covariance of the residuals at matched cells gives the covariance between the two fits. Noise
that the arms share cancels from every difference. Cells of one size deviate from the law together, so their
scatter has two levels (`noise`), and Student's t the degrees of freedom of those that a difference rests on; with
one budget a size, matched designs and laws linear in their parameters this is exact.

Few sizes can lie close to a law by chance. So where seeds repeat, no interval is narrower than the cells' scatter
pooled with the noise of seeds makes it. With a single degree of freedom (three sizes) the seeds' noise counts as a
second measurement of the scatter: right while sizes deviate by up to about twice the noise of a cell's mean.

A multiplier g solves L_A(x) = L_B(g x). Its interval is every g at which the two sides are not significantly
different (Fieller 1954): it is right where the delta method is not, near the baseline's floor, and says
"unbounded" where the data do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import block_diag
from scipy.special import stdtrit

from qies.scaling.comparison.noise import Strata, pseudo_inverse, strata
from qies.scaling.laws.intervals import ROUNDING, reach

Array = NDArray[np.float64]
Rows = NDArray[np.int64]
Evaluate = Callable[[Array, Array], tuple[Array, Array]]
Path = Callable[[Array], Array]

LIMIT = math.log(1e4)  # multipliers beyond count as "never"
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
class JointFit:
    """Both arms' laws and how well they are known.

    `covariance` [2p, 2p] of (theta_A, theta_B) is `by_cell`, from the cells' own scatter, plus what the deviations of
    whole sizes add; `floor`, where seeds repeat, is that by the cells' scatter pooled with the noise of seeds, with
    its dof. `cells` [na + nb, na + nb] is the covariance of both arms' cell means, `sigma` [2, 2] that of one cell in
    both arms; `matched` as for `join`. `basis`: what measured the noise, "cells", "cells and seeds", "seeds" or "none".
    """

    a: Law
    b: Law
    sigma: Array
    covariance: Array
    by_cell: Array
    cells: Array
    matched: Rows
    strata: Strata
    dof: int
    level: float
    basis: str
    floor: tuple[Array, int] | None = None

    @property
    def measured(self) -> bool:
        """Whether the scatter of cells around the laws is known."""
        return self.basis.startswith("cells")

    def spread(self, gradient: Array) -> tuple[Array, Array]:
        """Half the interval's width, and degrees of freedom, of contrasts gradient [n, 2p] of (theta_A, theta_B).

        The half-width is NaN where nothing measures the noise.
        """
        if self.dof == 0:
            return np.full(len(gradient), np.nan), np.zeros(len(gradient))
        variance, cell = (_variance(gradient, part) for part in (self.covariance, self.by_cell))
        dof = np.full(len(gradient), float(self.dof))
        if self.basis == "cells":
            dof = self.strata.freedom(cell, variance - cell)
        half = stdtrit(dof, 0.5 + self.level / 2) * np.sqrt(variance)
        if self.floor is not None:
            least, freedom = self.floor
            half = np.maximum(half, float(stdtrit(freedom, 0.5 + self.level / 2)) * np.sqrt(_variance(gradient, least)))
        return half, dof

    def difference(self, xa: Array, xb: Array) -> tuple[Array, Array, Array]:
        """log L_A(xa) - log L_B(xb) at [n, k] each, half its interval's width, and the degrees of freedom."""
        fa, ja = self.a.evaluate(self.a.theta, xa)
        fb, jb = self.b.evaluate(self.b.theta, xb)
        return fa - fb, *self.spread(np.concatenate([ja, -jb], axis=1))

    def band(self, arm: str, x: Array) -> tuple[Array, Array, Array]:
        """Loss of arm "a" or "b" at x [n, k] with its interval: (loss, lo, hi); NaN ends without dof."""
        law, first = (self.a, 0) if arm == "a" else (self.b, len(self.a.theta))
        value, jacobian = law.evaluate(law.theta, x)
        gradient = np.zeros((len(x), len(self.covariance)))
        gradient[:, first : first + jacobian.shape[1]] = jacobian
        half = self.spread(gradient)[0]
        return np.exp(value), np.exp(value - half), np.exp(value + half)


def join(
    a: Law,
    b: Law,
    matched: Rows,
    level: float,
    seeds: tuple[Array, int] | None = None,
    sizes: tuple[Rows, Rows] | None = None,
) -> JointFit:
    """Both laws with their covariance. `matched` [m, 2] integer: row of a's cell, row of b's.

    `seeds`: (covariance 2 x 2 of cell means over seeds, its degrees of freedom). `sizes`: the number of each cell's
    size, alike in both arms; by default every cell is of a size of its own.
    """
    if sizes is None:
        sizes = np.arange(len(a.residual)), len(a.residual) + np.arange(len(b.residual))
        sizes[1][matched[:, 1]] = matched[:, 0]
    levels = _strata(a, b, matched, sizes)
    dof, basis, floor = levels.dof, "cells", None
    inverse = block_diag(pseudo_inverse(a.jacobian), pseudo_inverse(b.jacobian))
    arm, size = np.repeat([0, 1], [len(sizes[0]), len(sizes[1])]), np.concatenate(sizes)
    same = np.eye(len(arm))
    same[matched[:, 0], len(sizes[0]) + matched[:, 1]] = same[len(sizes[0]) + matched[:, 1], matched[:, 0]] = 1.0
    together = size[:, None] == size

    def propagate(sigma: Array, ratio: float) -> tuple[Array, Array]:
        """Of the cell means [na + nb, na + nb] and of the parameters [2p, 2p]."""
        cells = sigma[arm[:, None], arm] * (same + ratio * together)
        return cells, inverse @ cells @ inverse.T

    if dof > 0:
        sigma = _scatter(a, b, matched, sizes, levels.ratio)
        if seeds is not None and dof == 1:
            sigma, dof, basis = (sigma + seeds[0]) / 2, 2, "cells and seeds"
        elif seeds is not None:
            pooled = (dof * _scatter(a, b, matched, sizes, 0.0) + seeds[1] * seeds[0]) / (dof + seeds[1])
            floor = propagate(pooled, 0.0)[1], dof + seeds[1]
    elif seeds is not None:
        (sigma, dof), basis = seeds, "seeds"
    else:
        sigma, dof, basis = np.full((2, 2), np.nan), 0, "none"
    cells, whole = propagate(sigma, levels.ratio)
    return JointFit(a, b, sigma, whole, propagate(sigma, 0.0)[1], cells, matched, levels, dof, level, basis, floor)


def _paired(a: Law, b: Law, matched: Rows) -> bool:
    """Whether the matched cells hold enough to estimate how much noise the arms share: more than half of the degrees
    of freedom that the arm with fewer cells has.

    With fewer, the correlation is left out, which widens intervals by as much as shared noise would have cancelled,
    and the scatter keeps the degrees of freedom of whole arms.
    """
    return 2 * (len(matched) - a.jacobian.shape[1]) > min(a.dof, b.dof)


def _strata(a: Law, b: Law, matched: Rows, sizes: tuple[Rows, Rows]) -> Strata:
    """Of the arms' differences where the arms are paired, as noise that they share cancels from them; else of the arm
    with fewer cells."""
    left, right = matched.T
    if _paired(a, b, matched):
        mean = (a.jacobian[left] + b.jacobian[right]) / 2
        return strata(a.residual[left] - b.residual[right], mean, sizes[0][left])
    law, size = min(((a, sizes[0]), (b, sizes[1])), key=lambda pair: len(pair[0].residual))
    return strata(law.residual, law.jacobian, size)


def _scatter(a: Law, b: Law, matched: Rows, sizes: tuple[Rows, Rows], ratio: float) -> Array:
    """The 2 x 2 covariance of a cell's mean in both arms, whose sizes deviate by `ratio` times as much variance."""
    expected = []
    for law, size in ((a, sizes[0]), (b, sizes[1])):
        maker = np.eye(len(size)) - law.jacobian @ pseudo_inverse(law.jacobian)
        expected.append(law.dof + ratio * float((maker * (size[:, None] == size)).sum()))
    matched = matched if _paired(a, b, matched) else matched[:0]
    return covariance([a.residual, b.residual], matched) / np.sqrt(np.outer(expected, expected))


def covariance(residual: Sequence[Array], matched: Rows) -> Array:
    """2 x 2: the sums of squares of both arms' residuals, and the correlation of the matched ones scaled alike.

    A sum of products over the matched cells alone may exceed what the sums of squares allow.
    """
    own = [float(r @ r) for r in residual]
    ra, rb = residual[0][matched[:, 0]], residual[1][matched[:, 1]]
    lengths = float(np.linalg.norm(ra) * np.linalg.norm(rb))
    cross = float(ra @ rb) / lengths * math.sqrt(own[0] * own[1]) if lengths > 0 else 0.0
    return np.array([[own[0], cross], [cross, own[1]]])


def _variance(gradient: Array, covariance: Array) -> Array:
    return np.maximum(np.einsum("ni,ij,nj->n", gradient, covariance, gradient), 0.0)


def multipliers(joint: JointFit, path_a: Path, path_b: Path, x: Array) -> tuple[Array, Array, Array]:
    """g with L_A(path_a(x)) = L_B(path_b(log g + x)) at log x [n], and its interval: (g, lo, hi).

    A path takes logs [n] to inputs [n, k]. g is NaN where none within 1e-4 to 1e4 does it: the baseline's floor lies
    above A's loss, say, and then hi is inf, and lo the g below which the baseline is significantly worse. lo = 0 and
    hi = inf where that end is unbounded.
    """
    target = path_a(x)

    def gap(log_g: Array) -> tuple[Array, Array, Array]:
        return joint.difference(target, path_b(x + log_g))

    full = np.full(len(x), LIMIT)
    now = gap(np.zeros(len(x)))[0]
    root = np.where(np.abs(now) < ROUNDING, 0.0, bisect(lambda v: gap(v)[0], -full, full))
    if joint.dof == 0:
        return np.exp(root), np.full(len(x), np.nan), np.full(len(x), np.nan)
    start = np.where(np.isnan(root), -np.sign(now) * LIMIT, root)

    def beyond(log_g: Array, sign: int) -> Array:
        """Positive where L_A(x) is significantly above (+1) or below (-1) the baseline's loss at g x."""
        difference, half, _ = gap(log_g)
        return sign * difference - half

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
    joint: JointFit, path_a: Path, path_b: Path, low: float, high: float
) -> list[tuple[float, float | None, float | None, int]]:
    """Every log x in [low, high] where the arms' losses are equal: (x, lo, hi, sign).

    lo, hi bound the x around it at which the losses are not significantly different, None where that holds
    to the end of the range (or no interval exists). sign -1: A is the lower beyond it; +1: B is.
    """
    grid = np.linspace(low, high, 1 + math.ceil((high - low) / 0.02))
    gap, half, _ = joint.difference(path_a(grid), path_b(grid))
    if np.abs(gap).max() < ROUNDING:  # one law, not two that cross
        return []
    unclear = np.abs(gap) <= half if joint.dof else np.ones(len(grid), bool)
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
