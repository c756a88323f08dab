"""What fits share to state how sure they are: covariance, quantiles, condition number."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats import t as student

Array = NDArray[np.float64]

# Of the Jacobian with unit columns: a step along the weakest combination of parameters then moves the losses
# a thousand times less than one along the strongest, so the data do not tell them apart.
ILL_CONDITIONED = 1e3


def condition_number(jacobian: Array) -> float:
    """Of the Jacobian [n, p] with unit columns; infinite when a parameter moves nothing."""
    lengths = np.linalg.norm(jacobian, axis=0)
    return float(np.linalg.cond(jacobian / lengths)) if (lengths > 0).all() else math.inf


def huber_covariance(jacobian: Array, residual: Array, delta: float) -> tuple[float, Array]:
    """Scale of log L, covariance [p, p] of a Huber estimate (Huber 1973); inside delta, of least squares."""
    n, p = jacobian.shape
    inside = max(float((np.abs(residual) <= delta).mean()), 1 / n)
    scale = math.sqrt(float((np.clip(residual, -delta, delta) ** 2).sum()) / (n - p)) / inside
    return scale, scale**2 * np.linalg.pinv(jacobian.T @ jacobian, rcond=1e-15)


def t_quantile(level: float, dof: int) -> float:
    return float(student.ppf(0.5 + level / 2, dof))


def bootstrap_tails(level: float, n: int, dof: int) -> tuple[float, float]:
    """Bootstrap percentiles that stand for `level`: Hesterberg 2015, with dof in place of his n - 1."""
    tail = float(norm.cdf(-math.sqrt(n / dof) * t_quantile(level, dof)))
    return tail, 1 - tail
