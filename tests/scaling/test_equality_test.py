"""The test of shared exponents: exact where theory is, of its stated size and power where only simulation tells."""

import numpy as np
import pytest
from scipy.stats import linregress
from two_arms import ALPHA, A, E, chinchilla, grid, ladder, noisy, runs_of, table

from qies.scaling.comparison.equality_test import equality_test
from qies.scaling.comparison.gain_axes import SHARED, fit_gain_axes
from qies.scaling.comparison.matching import cells_of


def shared_test(runs):
    a, b = runs.of_arm("q"), runs.of_arm("t")
    ca, cb = cells_of(a, b)
    axes = fit_gain_axes(ca, cb, (a, b), "auto", 0.95, None)
    return equality_test(axes.of["compute"].joint, SHARED[axes.form], ("q", "t"))


def rejections(law, cells, count, seed, **noise):
    rng = np.random.default_rng(seed)
    return np.mean([shared_test(table(cells, noisy(rng, law, 1, **noise))).p < 0.05 for _ in range(count)])


def test_of_matched_power_laws_it_is_the_t_test_of_the_slope_of_differences():
    cells = ladder(np.geomspace(1e5, 1e8, 7))
    flops = 6 * cells.prod(axis=1)
    laws = {"q": 30 * flops**-0.06, "t": 28 * flops**-0.058}
    losses = noisy(np.random.default_rng(2), laws, 1, seed_sd=0.01, shared_sd=0.01)
    fit = shared_test(table(cells, losses))
    line = linregress(np.log(flops), np.log(losses["q"] / losses["t"])[:, 0])
    assert (fit.restrictions, fit.dof) == (1, 5)
    assert fit.statistic == pytest.approx((line.slope / line.stderr) ** 2, rel=1e-5)
    assert fit.p == pytest.approx(line.pvalue, rel=1e-4)


def test_exact_surfaces_give_back_both_arms_parameters():
    cells = grid()
    n, d = cells.T
    fit = shared_test(table(cells, {"q": chinchilla(n, d, e=1.7)[:, None], "t": chinchilla(n, d)[:, None]}))
    assert fit.separate["q"]["E"] == pytest.approx(1.7, rel=1e-4) and fit.separate["t"]["E"] == pytest.approx(
        E, rel=1e-4
    )
    assert fit.params["q"]["E"] == fit.params["t"]["E"] and fit.params["q"]["alpha"] == fit.params["t"]["alpha"]
    assert fit.p < 1e-6


def test_exact_surfaces_that_differ_in_amplitude_alone_share_the_rest():
    cells = grid()
    n, d = cells.T
    fit = shared_test(table(cells, {"q": chinchilla(n, d, a=0.8 * A)[:, None], "t": chinchilla(n, d)[:, None]}))
    assert fit.p > 0.99
    assert fit.params["q"]["A"] == pytest.approx(0.8 * A, rel=1e-3) and fit.params["t"]["A"] == pytest.approx(
        A, rel=1e-3
    )


SIX = np.geomspace(1e6, 3e7, 6)  # four sizes leave one degree of freedom to see how sizes deviate, and little power


def with_lone_cells(rng, share, sd=0.005):
    """The null: 6 sizes x 5 budgets in both arms and 6 cells more in one; `share` of the noise's variance is shared."""
    cells, lone = grid(SIX), np.array([(n, d) for n in (1.5e6, 9e6, 6e7) for d in (5e7, 3e8)])
    base = chinchilla(*cells.T)
    loss = noisy(rng, {"q": base, "t": base}, 1, seed_sd=sd * (1 - share) ** 0.5, shared_sd=sd * share**0.5)
    extra = noisy(rng, {"q": chinchilla(*lone.T)}, 1, seed_sd=sd)["q"]
    rows = [(n, d, loss[arm][i, 0], arm) for arm in loss for i, (n, d) in enumerate(cells)]
    rows += [(n, d, extra[i, 0], "q") for i, (n, d) in enumerate(lone)]
    n, d, y, arm = zip(*rows, strict=True)
    return runs_of(n, d, 6 * np.array(n) * np.array(d), y, arm, [0] * len(n), [np.nan] * len(n))


def test_noise_that_the_arms_share_is_no_difference_where_one_arm_has_further_cells(quick_fits):
    """The covariance over matched cells, taken over the variances of all cells, gave a correlation above 1 and
    F = 7.6e7."""
    rng = np.random.default_rng(0)
    found = [shared_test(with_lone_cells(rng, 0.9)) for _ in range(40)]
    assert max(fit.statistic for fit in found) < 10
    assert np.mean([fit.p < 0.05 for fit in found]) <= 0.125


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_size_is_five_percent_where_one_arm_has_further_cells(quick_fits):
    """400 tables have a binomial standard error of 1.1 %."""
    rng = np.random.default_rng(1)
    rejected = np.mean([shared_test(with_lone_cells(rng, 0.9)).p < 0.05 for _ in range(400)])
    print(f"rejected {100 * rejected:.1f} %")
    assert 0.02 <= rejected <= 0.075


def test_size_and_power_quickly(quick_fits):
    cells = grid(SIX)
    n, d = cells.T
    base = chinchilla(n, d)
    assert rejections({"q": base, "t": base}, cells, 30, 0, seed_sd=0.003, shared_sd=0.003) <= 0.15
    steeper = chinchilla(n, d, alpha=ALPHA + 0.05, a=A * 1e7**0.05)
    assert rejections({"q": steeper, "t": base}, cells, 10, 1, seed_sd=0.003, shared_sd=0.003) >= 0.8


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("shared", [0.0, 0.005])
def test_size_is_five_percent(quick_fits, shared):
    """600 tables have a binomial standard error of 0.9 %. With shared noise the test is conservative: 2.8 %."""
    cells = grid()
    base = chinchilla(*cells.T)
    rejected = rejections({"q": base, "t": base}, cells, 600, 3, seed_sd=0.003, shared_sd=shared)
    print(f"rejected {100 * rejected:.1f} % (shared noise {shared})")
    assert 0.02 <= rejected <= 0.07


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_power_for_an_exponent_that_differs_by_0_04_is_at_least_80_percent(quick_fits):
    cells = grid(SIX)
    n, d = cells.T
    law = {"q": chinchilla(n, d, alpha=ALPHA + 0.04, a=A * 1e7**0.04), "t": chinchilla(n, d)}
    found = rejections(law, cells, 200, 4, seed_sd=0.003, shared_sd=0.003)
    print(f"found {100 * found:.1f} %")
    assert found >= 0.8
