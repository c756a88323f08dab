"""Do two arms share their floor and exponents? One fit with them shared against two separate ones.

Both models are fitted to both arms at once by least squares on log loss, whitened by the 2 x 2 covariance of
the separate fits' residuals (Zellner 1962), so that noise which matched runs share is used and not counted
twice. F = (S_shared - S_separate) / restrictions, against F with as many denominator degrees of freedom as the
arm with fewer cells has left. Exact for matched designs and laws linear in their parameters; otherwise as good
as the law is near its optimum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve_triangular
from scipy.optimize import least_squares
from scipy.stats import f as fisher

from qies.scaling.intervals import ROUNDING
from qies.scaling.joint import Joint

Array = NDArray[np.float64]
Rows = NDArray[np.int64]

CORRELATED = 1 - 1e-9  # the closest that the noise of two arms' matched cells is taken to be


@dataclass(frozen=True)
class SharedFit:
    """F test of the hypothesis that `shared` parameters are equal in both arms; `statistic`, `p` None without dof.

    `params`: the fit with them shared, per arm; `separate`: without. E, A and B in the loss's units.
    """

    shared: tuple[str, ...]
    statistic: float | None
    p: float | None
    restrictions: int
    dof: int
    params: dict[str, dict[str, float]]
    separate: dict[str, dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        values = {k: getattr(self, k) for k in self.__dataclass_fields__}
        return values | {"shared": list(self.shared)}


def shared_fit(joint: Joint, matched: Rows, shared: tuple[str, ...], arms: tuple[str, str]) -> SharedFit:
    """Test that both laws have the same `shared` parameters; `matched` [m, 2] as for `join`."""
    p = len(joint.a.theta)
    common = np.array([name.removeprefix("log ") in shared for name in joint.a.names])
    apart = np.arange(p), p + np.arange(p)
    # Arm A's parameters come first; B points at A's where they are shared and at its own, behind them, elsewhere.
    together = np.arange(p), np.where(common, np.arange(p), p - 1 + np.cumsum(~common))
    mean = np.where(common, (joint.a.theta + joint.b.theta) / 2, joint.a.theta)
    root = _covariance_root(joint, matched)
    separate, s_separate = _fit(joint, apart, np.concatenate([joint.a.theta, joint.b.theta]), root)
    one, s_shared = _fit(joint, together, np.concatenate([mean, joint.b.theta[~common]]), root)
    statistic = probability = None
    if joint.basis == "cells":
        statistic = max(s_shared - s_separate, 0.0) / int(common.sum())
        probability = float(fisher.sf(statistic, int(common.sum()), joint.dof))

    def named(theta: Array, places: tuple[Rows, Rows]) -> dict[str, dict[str, float]]:
        return {arm: joint.a.natural(theta[place]) for arm, place in zip(arms, places, strict=True)}

    return SharedFit(
        shared, statistic, probability, int(common.sum()), joint.dof, named(one, together), named(separate, apart)
    )


def _covariance_root(joint: Joint, matched: Rows) -> Array:
    """Lower Cholesky factor of the residuals' covariance, arm A's cells before arm B's; unit without one."""
    na, nb = len(joint.a.residual), len(joint.b.residual)
    if joint.basis != "cells":
        return np.eye(na + nb)
    sigma = joint.sigma + ROUNDING**2 * np.eye(2)
    omega = np.diag(np.repeat(np.diag(sigma), [na, nb]))
    # Arms that are the same runs share all of their noise, and few cells may be estimated to share more than that.
    most = CORRELATED * np.sqrt(sigma[0, 0] * sigma[1, 1])
    shared = np.clip(sigma[0, 1], -most, most)
    omega[matched[:, 0], na + matched[:, 1]] = omega[na + matched[:, 1], matched[:, 0]] = shared
    return cholesky(omega, lower=True)


def _fit(joint: Joint, places: tuple[Rows, Rows], start: Array, root: Array) -> tuple[Array, float]:
    """Generalised least squares of both arms' cells; `places` index each arm's theta in the whole."""
    laws = (joint.a, joint.b)
    observed = np.concatenate([law.evaluate(law.theta, law.x)[0] + law.residual for law in laws])

    def residual(theta: Array) -> Array:
        fitted = [law.evaluate(theta[place], law.x)[0] for law, place in zip(laws, places, strict=True)]
        return solve_triangular(root, np.concatenate(fitted) - observed, lower=True)

    def jacobian(theta: Array) -> Array:
        rows = []
        for law, place in zip(laws, places, strict=True):
            block = np.zeros((len(law.residual), len(theta)))
            block[:, place] = law.evaluate(theta[place], law.x)[1]
            rows.append(block)
        return solve_triangular(root, np.concatenate(rows), lower=True)

    tight = {"ftol": 1e-12, "xtol": 1e-12, "gtol": 1e-12, "max_nfev": 2000}
    found = least_squares(residual, start, jacobian, x_scale="jac", **tight)
    return found.x, 2 * float(found.cost)
