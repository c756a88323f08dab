"""Multipliers, their intervals and crossings against formulas on paper."""

import numpy as np
import pytest
from scipy.stats import t as student

from qies.scaling.comparison.gain_axes import POWER, power, surface
from qies.scaling.comparison.joint_inference import crossings, join, make_law, multipliers

U = np.log(np.geomspace(1e4, 1e7, 6))
SAME = np.stack([np.arange(6)] * 2, axis=1)


def column(x):
    return x[:, None]


def exact(log_a, alpha):
    return make_law(power, POWER, np.array([log_a, alpha]), U[:, None], log_a - alpha * U)


def least_squares(y, x=U):
    theta = np.linalg.lstsq(np.stack([np.ones_like(x), -x], axis=1), y, rcond=None)[0]
    return make_law(power, POWER, theta, x[:, None], y)


def two_noisy(seed=0, sd=0.01, shared=0.0, shift=0.1):
    rng = np.random.default_rng(seed)
    common = shared * rng.standard_normal(6)
    a, b = (3.0 - 0.1 * U - move + common + sd * rng.standard_normal(6) for move in (shift, 0.0))
    return a, b, join(least_squares(a), least_squares(b), SAME, 0.95)


def test_multiplier_of_two_power_laws_is_the_formula():
    joint = join(exact(2.9, 0.11), exact(3.0, 0.10), SAME, 0.95)
    g, lo, hi = multipliers(joint, column, column, U)
    np.testing.assert_allclose(np.log(g), (3.0 - 2.9 + (0.11 - 0.10) * U) / 0.10, rtol=1e-9)
    np.testing.assert_allclose(lo, g, rtol=1e-6)
    np.testing.assert_allclose(hi, g, rtol=1e-6)


def test_crossing_is_where_the_lines_meet_and_says_who_is_lower_beyond():
    joint = join(exact(3.2, 0.12), exact(3.0, 0.10), SAME, 0.95)  # equal at log x = 0.2 / 0.02 = 10
    ((x, lo, hi, sign),) = crossings(joint, column, column, U[0] - 2, U[-1] + 2)
    assert (x, sign) == (pytest.approx(10.0, abs=1e-9), -1)
    assert lo == pytest.approx(10, abs=0.05) and hi == pytest.approx(10, abs=0.05)
    assert crossings(join(exact(3, 0.1), exact(3, 0.1), SAME, 0.95), column, column, U[0], U[-1]) == []


def test_difference_of_matched_laws_is_the_regression_of_the_differences():
    a, b, joint = two_noisy(shared=0.05)
    value, half, dof = joint.difference(column(U), column(U))
    error = half / student.ppf(0.975, dof)
    design = np.stack([np.ones_like(U), U], axis=1)
    coefficients, *_ = np.linalg.lstsq(design, a - b, rcond=None)
    residual = a - b - design @ coefficients
    hat = np.einsum("ni,ij,nj->n", design, np.linalg.inv(design.T @ design), design)
    np.testing.assert_allclose(value, design @ coefficients, atol=1e-10)
    np.testing.assert_allclose(error, np.sqrt(residual @ residual / 4 * hat), rtol=1e-6)
    assert joint.dof == 4


def test_three_matched_sizes_of_six_leave_the_arms_their_own_degrees_of_freedom():
    """Differences at three sizes alone have one, by which the interval would be 4.6 times as wide."""
    a, b, whole = two_noisy()
    few = join(least_squares(a), least_squares(b), SAME[:3], 0.95)
    _, half, dof = few.difference(column(U[-1:]), column(U[-1:]))
    assert dof == [4] and few.dof == 4 and few.sigma[0, 1] == 0
    error = np.sqrt(whole.a.residual @ whole.a.residual / 4 + whole.b.residual @ whole.b.residual / 4)
    leverage = 1 / 6 + (U[-1] - U.mean()) ** 2 / ((U - U.mean()) ** 2).sum()
    np.testing.assert_allclose(half, student.ppf(0.975, 4) * error * np.sqrt(leverage), rtol=1e-9)


def test_noise_that_the_arms_share_does_not_widen_the_band():
    narrow, wide = (two_noisy(shared=s)[2].difference(column(U), column(U))[1] for s in (0.0, 0.5))
    np.testing.assert_allclose(narrow, wide, rtol=0.35)


def test_interval_solves_fiellers_quadratic():
    _, _, joint = two_noisy(seed=4, shift=0.03)
    g, lo, hi = (v[-1] for v in multipliers(joint, column, column, U))
    # log gain = r / s with r = log L_B - log L_A at x and s = alpha_B, both linear in (theta_A, theta_B)
    rows = np.array([[-1, U[-1], 1, -U[-1]], [0, 0, 0, 1]])
    r, s = rows @ np.concatenate([joint.a.theta, joint.b.theta])
    v = rows @ joint.covariance @ rows.T * student.ppf(0.975, 4) ** 2
    roots = np.sort(np.roots([s**2 - v[1, 1], -2 * (r * s - v[0, 1]), r**2 - v[0, 0]]))
    np.testing.assert_allclose([np.log(lo), np.log(g), np.log(hi)], [roots[0], r / s, roots[1]], atol=1e-6)


def test_interval_is_unbounded_where_the_baseline_does_not_fall():
    rng = np.random.default_rng(1)
    flat = least_squares(3 - 0.001 * U + 0.02 * rng.standard_normal(6))
    joint = join(least_squares(2.95 - 0.05 * U + 0.02 * rng.standard_normal(6)), flat, SAME, 0.95)
    _, lo, hi = multipliers(joint, column, column, U[-1:])
    assert np.isnan(hi[0]) or np.isinf(hi[0]) or lo[0] == 0


def test_gain_below_the_baselines_floor_is_unbounded_from_the_furthest_multiplier_on():
    law = {"a": [np.log(1.0), 5.0, 6.0, 0.3, 0.3], "b": [np.log(2.0), 5.0, 6.0, 0.3, 0.3]}
    x = np.log(np.array([(n, d) for n in (1e6, 1e7, 1e8) for d in (1e7, 1e8, 1e9)]))
    names = ("log E", "log A", "log B", "alpha", "beta")
    laws = [make_law(surface, names, np.array(t), x, surface(np.array(t), x)[0]) for t in law.values()]
    joint = join(*laws, np.stack([np.arange(9)] * 2, axis=1), 0.95)
    path = lambda log_n: np.stack([log_n, np.full_like(log_n, np.log(1e12))], axis=1)  # noqa: E731
    g, lo, hi = multipliers(joint, path, path, np.log([1e9]))
    assert np.isnan(g[0]) and lo[0] == pytest.approx(1e4) and np.isinf(hi[0])
    back = join(laws[1], laws[0], np.stack([np.arange(9)] * 2, axis=1), 0.95)
    g, lo, hi = multipliers(back, path, path, np.log([1e9]))
    assert np.isnan(g[0]) or hi[0] < 1


def test_reach_is_the_worst_coordinates_factor():
    law = exact(3.0, 0.1)
    inside, above, below = np.log([1e5, 3e7, 1e3])
    np.testing.assert_allclose(law.reach(column(np.array([inside, above, below]))), [1, 3, 10], rtol=1e-9)


def test_reach_of_isoflop_runs_counts_compute():
    """Sizes and tokens of the isoFLOP grid go further than its compute: 4 times the largest is outside."""
    compute = np.repeat(np.geomspace(1e18, 1e20, 4), 7)
    log_n = np.log(np.tile(np.geomspace(0.1, 10, 7), 4) * np.sqrt(compute / 120))
    x = np.stack([log_n, np.log(compute / 6) - log_n], axis=1)
    theta = np.array([np.log(1.8), np.log(400.0), np.log(900.0), 0.34, 0.34])
    law = make_law(surface, ("log E", "log A", "log B", "alpha", "beta"), theta, x, surface(theta, x)[0])
    best = np.log([[c / 120 for c in (1e20, 4e20, 1e17)]]).T / 2 + np.log([1, 20])
    np.testing.assert_allclose(law.reach(best), [1, 4, 10], rtol=1e-9)


def test_seeds_give_the_noise_where_laws_pass_through_every_point():
    two = [make_law(power, POWER, np.array([3.0, 0.1]), U[:2, None], 3 - 0.1 * U[:2]) for _ in range(2)]
    joint = join(*two, SAME[:2], 0.95, (np.array([[4e-4, 0], [0, 4e-4]]), 6))
    _, half, dof = joint.difference(column(U[:2]), column(U[:2]))
    error = half / student.ppf(0.975, dof)
    np.testing.assert_allclose(error, np.sqrt(8e-4), rtol=1e-6)  # at a cell the law is the cell's mean
    assert (joint.dof, joint.basis) == (6, "seeds")
    assert join(*two, SAME[:2], 0.95).basis == "none"
