"""The power of planned studies against theory, and what it takes from a table."""

import numpy as np
import pytest
from two_arms import chinchilla, grid, ladder, noisy, table

from qies.errors import UserError
from qies.scaling import compare
from qies.scaling.comparison import planning
from qies.scaling.comparison.planning import power
from qies.scaling.comparison.statistical_power import t_power


def test_power_without_seeds_is_that_of_a_t_test_of_the_line_of_differences():
    sizes, span, slope, sd = 6, 30.0, 0.06, 0.005
    x = np.linspace(0, np.log(span), sizes)
    leverage = 1 / sizes + (x[-1] - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum()
    theory = t_power(slope * np.log(1.2), sd * np.sqrt(leverage), sizes - 2, 0.95)
    assert 0.2 < theory < 0.9
    assert power(sizes, 1, 1.2, sd, 0.0, slope, span, 0.95) == pytest.approx(theory, abs=0.06)


def test_no_gain_is_found_in_no_more_than_half_of_five_percent():
    assert power(5, 3, 1.0, 0.004, 0.003, 0.06, 30.0, 0.95) <= 0.05


def test_the_plan_takes_noise_and_slope_from_the_runs(monkeypatch):
    monkeypatch.setattr(planning, "power", lambda *_: 0.5)  # what it is called with matters here
    cells = ladder(np.geomspace(1e6, 1e8, 40))
    base = 30 * (6 * cells.prod(axis=1)) ** -0.06
    losses = noisy(np.random.default_rng(0), {"q": base, "t": base}, 3, seed_sd=0.004, shared_sd=0.02, size_sd=0.003)
    plan = compare(table(cells, losses, 3), "q", "t", form="power", points=2, plan=True).plan
    assert plan.seed_sd == pytest.approx(0.004 * np.sqrt(2), rel=0.2)
    assert plan.size_sd == pytest.approx(0.003 * np.sqrt(2), rel=0.3)
    assert plan.slope == pytest.approx(0.06, rel=0.1) and plan.span == pytest.approx(1e4, rel=1e-6)
    assert {(row.sizes, row.seeds) for row in plan.rows} >= {(3, 1), (4, 3), (8, 8)}


def test_noise_between_sizes_is_measured_around_the_laws_that_were_fitted(monkeypatch):
    """Over a grid of N and D the arms' surfaces differ, which a line in FLOPs would take for noise between sizes."""
    monkeypatch.setattr(planning, "power", lambda *_: 0.5)
    cells = grid()
    law = {"q": chinchilla(*cells.T, a=50.0), "t": chinchilla(*cells.T)}
    losses = noisy(np.random.default_rng(0), law, 4, seed_sd=0.0005)
    plan = compare(table(cells, losses, 4), "q", "t", points=2, plan=True).plan
    difference = np.log(law["q"] / law["t"])
    x = np.log(cells.prod(axis=1))
    assert (difference - np.polyval(np.polyfit(x, difference, 1), x)).std() > 0.004
    assert plan.size_sd < 0.001 and "including misfit of the laws" in plan.table().title


def test_runs_that_measure_no_noise_make_no_plan():
    cells = ladder()
    base = 30 * (6 * cells.prod(axis=1)) ** -0.06
    losses = noisy(np.random.default_rng(0), {"q": base, "t": base}, 1, seed_sd=0.004)
    with pytest.raises(UserError, match="it needs two seeds in both arms and three matched sizes"):
        compare(table(cells, losses), "q", "t", plan=True)
