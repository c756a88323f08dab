"""Do two arms share their floor and exponents? One fit with them shared against two separate ones.

Both models are fitted to both arms at once by least squares on log loss, whitened by the covariance of the cell means
(`joint_inference`), so that noise which matched runs or cells of one size share is used and not counted twice.
F = (S_shared - S_separate) / restrictions, against F with the fewest degrees of freedom that any of the shared
parameters' differences has. Exact for matched designs with one budget a size and laws linear in their parameters;
otherwise as good as the law is near its optimum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve_triangular
from scipy.stats import f as fisher

from qies.scaling.comparison.joint_inference import JointFit, covariance
from qies.scaling.laws.intervals import ROUNDING
from qies.scaling.laws.solver import minimise_residuals

Array = NDArray[np.float64]
Rows = NDArray[np.int64]

CORRELATED = 1 - 1e-9  # the largest correlation that two arms' matched cells are taken to have
ROUNDS = 3  # of estimating the arms' covariance again from the joint fit


@dataclass(frozen=True)
class EqualityTest:
    """F test of the hypothesis that `shared` parameters are equal in both arms; `statistic`, `p` None without dof.

    `params`: the fit with them shared, per arm; `separate`: without. E, A and B in the loss's units.
    """

    shared: tuple[str, ...]
    statistic: float | None
    p: float | None
    restrictions: int
    dof: float
    params: dict[str, dict[str, float]]
    separate: dict[str, dict[str, float]]


def equality_test(joint: JointFit, shared: tuple[str, ...], arms: tuple[str, str]) -> EqualityTest:
    """Test that both laws have the same `shared` parameters."""
    p = len(joint.a.theta)
    common = np.array([name.removeprefix("log ") in shared for name in joint.a.names])
    apart = np.arange(p), p + np.arange(p)
    # Arm A's parameters come first; B points at A's where they are shared and at its own, behind them, elsewhere.
    together = np.arange(p), np.where(common, np.arange(p), p - 1 + np.cumsum(~common))
    mean = np.where(common, (joint.a.theta + joint.b.theta) / 2, joint.a.theta)
    root = _root(joint, joint.cells)
    separate, s_separate = _fit(joint, apart, np.concatenate([joint.a.theta, joint.b.theta]), root)
    # Cells that do not match pull the separate laws apart and hide how much noise the arms share; a joint fit shows it.
    for _ in range(ROUNDS if joint.measured and 0 < len(joint.matched) < max(map(len, (joint.a.x, joint.b.x))) else 0):
        root = _root(joint, _reweighted(joint, separate))
        separate, s_separate = _fit(joint, apart, separate, root)
    one, s_shared = _fit(joint, together, np.concatenate([mean, joint.b.theta[~common]]), root)
    statistic = probability = None
    dof: float = joint.dof
    if joint.measured:
        contrasts = np.concatenate([np.eye(p), -np.eye(p)], axis=1)[common]
        dof = float(joint.spread(contrasts)[1].min())
        statistic = max(s_shared - s_separate, 0.0) / int(common.sum())
        probability = float(fisher.sf(statistic, int(common.sum()), dof))

    def named(theta: Array, places: tuple[Rows, Rows]) -> dict[str, dict[str, float]]:
        return {arm: joint.a.natural(theta[place]) for arm, place in zip(arms, places, strict=True)}

    return EqualityTest(
        shared, statistic, probability, int(common.sum()), dof, named(one, together), named(separate, apart)
    )


def _root(joint: JointFit, cells: Array) -> Array:
    """Lower Cholesky factor of the cell means' covariance, arm A's cells before arm B's; unit where it is unknown."""
    if not joint.measured:
        return np.eye(len(cells))
    # Arms that are the same runs share all of their noise, and exact laws have none.
    own = np.diag(np.diag(cells))
    return cholesky(cells + (1 - CORRELATED) * own + ROUNDING**2 * np.eye(len(own)), lower=True)


def _reweighted(joint: JointFit, theta: Array) -> Array:
    """`joint.cells` with the noise that the laws theta [2p] leave: its size in each arm, and its correlation."""
    residual = [
        law.residual + law.evaluate(law.theta, law.x)[0] - law.evaluate(own, law.x)[0]
        for law, own in zip((joint.a, joint.b), np.split(theta, 2), strict=True)
    ]
    before = covariance([joint.a.residual, joint.b.residual], joint.matched)
    after = covariance(residual, joint.matched)
    arm = np.repeat([0, 1], [len(r) for r in residual])
    factor = np.divide(after, before, out=np.ones_like(after), where=before != 0)
    return joint.cells * factor[arm[:, None], arm]


def _fit(joint: JointFit, places: tuple[Rows, Rows], start: Array, root: Array) -> tuple[Array, float]:
    """Generalised least squares of both arms' cells; `places` index each arm's theta in the whole."""
    laws = (joint.a, joint.b)
    observed = np.concatenate([law.evaluate(law.theta, law.x)[0] + law.residual for law in laws])

    def evaluate(theta: Array) -> tuple[Array, Array]:
        fitted, blocks = [], []
        for law, place in zip(laws, places, strict=True):
            value, jacobian = law.evaluate(theta[place], law.x)
            block = np.zeros((len(value), len(theta)))
            block[:, place] = jacobian
            fitted.append(value)
            blocks.append(block)
        parts = np.concatenate(fitted) - observed, np.concatenate(blocks)
        return tuple(solve_triangular(root, part, lower=True) for part in parts)

    theta, objective = minimise_residuals(evaluate, start, np.ones(len(observed)), math.inf)
    return theta, 2 * objective
