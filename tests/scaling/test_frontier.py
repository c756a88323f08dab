"""The frontier under any cost, against a search and the formula of 6ND."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from two_arms import ALPHA, BETA, A, B, chinchilla

from qies.scaling.laws.frontier import SIX_ND, Cost, fit_cost, optimum

TERMS = (A, ALPHA, B, BETA)


def test_cost_is_recovered_from_runs():
    log_n, log_d = np.log([1e6, 1e6, 1e7, 1e8]), np.log([1e8, 1e9, 1e9, 3e9])
    cost = fit_cost(log_n, log_d, np.log(6) + log_n + log_d)
    assert (np.exp(cost.log_k), cost.p, cost.q) == pytest.approx((6, 1, 1))
    assert cost.scatter < 1e-9


@pytest.mark.parametrize("cost", [SIX_ND, Cost(np.log(40), 0.8, 1.1, 0)])
def test_optimum_is_the_least_loss_at_its_cost(cost):
    (point,) = optimum(TERMS, cost, np.array([np.log(1e19)]))
    assert cost.log(*point) == pytest.approx(np.log(1e19))

    def loss(log_n):
        return chinchilla(np.exp(log_n), np.exp((np.log(1e19) - cost.log_k - cost.p * log_n) / cost.q))

    found = minimize_scalar(loss, bounds=(10, 30), method="bounded", options={"xatol": 1e-9})
    assert point[0] == pytest.approx(found.x, abs=1e-5)


def test_of_6nd_is_hoffmanns_formula():
    c = 1e20
    g = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
    ((log_n, log_d),) = optimum(TERMS, SIX_ND, np.array([np.log(c)]))
    assert np.exp(log_n) == pytest.approx(g * (c / 6) ** (BETA / (ALPHA + BETA)))
    assert np.exp(log_d) == pytest.approx((c / 6) ** (ALPHA / (ALPHA + BETA)) / g)


def test_a_cost_that_does_not_grow_has_no_optimum():
    with pytest.raises(ValueError, match="no interior optimum"):
        optimum(TERMS, Cost(0, 0, 1, 0), np.array([1.0]))
