"""The compute-optimal frontier of a fitted surface under any cost of a run.

    L(N, D) = E + A N^-alpha + B D^-beta,   cost(N, D) = k N^p D^q

FLOPs of 6ND are k = 6, p = q = 1. Costs that are counted (embeddings, attention, a cheaper mixer) or measured
(seconds) follow the same form with other k, p, q, fitted to the runs. At fixed cost the loss is least where
alpha A N^-alpha / p = beta B D^-beta / q (Hoffmann et al. 2022, arXiv:2203.15556, equation 4, has p = q = 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Cost:
    """cost = k N^p D^q; `scatter` is the root mean square of the log residuals over the runs it was fitted to."""

    log_k: float
    p: float
    q: float
    scatter: float

    def log(self, log_n: Array, log_d: Array) -> Array:
        return self.log_k + self.p * log_n + self.q * log_d


def fit_cost(log_n: Array, log_d: Array, log_cost: Array) -> Cost:
    """Least squares in logs over runs [n] with at least three different (N, D)."""
    design = np.stack([np.ones_like(log_n), log_n, log_d], axis=1)
    (log_k, p, q), *_ = np.linalg.lstsq(design, log_cost, rcond=None)
    residual = log_cost - design @ np.array([log_k, p, q])
    return Cost(float(log_k), float(p), float(q), math.sqrt(float(np.mean(residual**2))))


SIX_ND = Cost(math.log(6.0), 1.0, 1.0, 0.0)


def optimum(terms: tuple[float, float, float, float], cost: Cost, log_cost: Array) -> Array:
    """[n, 2]: (log N, log D) of the lowest loss at each log cost [n]; `terms` A, alpha, B, beta of the surface.

    Raises ValueError where p, q or an exponent is not positive: there the frontier has no interior optimum.
    """
    a, alpha, b, beta = terms
    if not min(*terms, cost.p, cost.q) > 0:
        raise ValueError("no interior optimum: the loss or the cost does not move with size or tokens")
    # N^(alpha + beta p / q) = (alpha A q) / (beta B p) (cost / k)^(beta / q)
    ratio = math.log(alpha) + math.log(a) + math.log(cost.q) - math.log(beta) - math.log(b) - math.log(cost.p)
    log_n = (ratio + beta / cost.q * (log_cost - cost.log_k)) / (alpha + beta * cost.p / cost.q)
    return np.stack([log_n, (log_cost - cost.log_k - cost.p * log_n) / cost.q], axis=1)
