"""The test of shared exponents: exact where theory is, of its stated size and power where only simulation tells."""

import numpy as np
import pytest
from scipy.stats import linregress
from two_arms import ALPHA, A, E, chinchilla, grid, ladder, noisy, table

from qies.scaling.matching import cells_of, match
from qies.scaling.shared import shared_fit
from qies.scaling.views import SHARED, make_views


def shared_test(runs):
    a, b = runs.of_arm("q"), runs.of_arm("t")
    ca, cb = cells_of(a, b)
    views = make_views(ca, cb, (a, b), "auto", 0.95, None)
    return shared_fit(views.of["compute"].joint, match(ca, cb), SHARED[views.form], ("q", "t"))


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


def test_size_and_power_quickly():
    cells = grid()
    n, d = cells.T
    base = chinchilla(n, d)
    assert rejections({"q": base, "t": base}, cells, 30, 0, seed_sd=0.003, shared_sd=0.003) <= 0.15
    steeper = chinchilla(n, d, alpha=ALPHA + 0.04, a=A * 1e7**0.04)
    assert rejections({"q": steeper, "t": base}, cells, 10, 1, seed_sd=0.003, shared_sd=0.003) >= 0.8


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("shared", [0.0, 0.005])
def test_size_is_five_percent(shared):
    """600 tables have a binomial standard error of 0.9 %: the bounds are 2.2 of them from 5 %."""
    cells = grid()
    base = chinchilla(*cells.T)
    rejected = rejections({"q": base, "t": base}, cells, 600, 3, seed_sd=0.003, shared_sd=shared)
    print(f"rejected {100 * rejected:.1f} % (shared noise {shared})")
    assert 0.03 <= rejected <= 0.07


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_power_for_an_exponent_that_differs_by_0_025_is_at_least_80_percent():
    cells = grid()
    n, d = cells.T
    law = {"q": chinchilla(n, d, alpha=ALPHA + 0.025, a=A * 1e7**0.025), "t": chinchilla(n, d)}
    found = rejections(law, cells, 200, 4, seed_sd=0.003, shared_sd=0.003)
    print(f"found {100 * found:.1f} %")
    assert found >= 0.8
