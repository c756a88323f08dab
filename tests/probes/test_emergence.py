"""A break and a line, known and simulated."""

import numpy as np
import pytest

from qies.errors import UserError
from qies.probes.emergence import fit_emergence

X = np.linspace(0, 10, 21)


def test_a_break_without_noise_is_found_where_it_is():
    found = fit_emergence(X, np.maximum(0, X - 6) * 0.1, np.full(21, 0.01), draws=199)
    assert found.break_at == pytest.approx(6, abs=0.05) and found.low < 6 < found.high
    assert found.before == pytest.approx(0, abs=1e-3) and found.after == pytest.approx(0.1, abs=1e-3)
    assert found.delta_aicc > 100 and found.p_value == 1 / 200
    assert found.chi2_break == pytest.approx(0, abs=0.05)


def test_a_line_is_a_line():
    found = fit_emergence(X, 0.3 * X + 1, np.full(21, 0.1), draws=99)
    assert found.chi2_line == pytest.approx(0, abs=1e-9) and found.delta_aicc < 0 and found.p_value == 1
    assert found.before == pytest.approx(0.3) and found.after == pytest.approx(0.3)


def test_the_sum_of_squares_of_the_line_is_that_of_polyfit():
    rng = np.random.default_rng(0)
    y, se = rng.normal(size=21), rng.uniform(0.5, 2, 21)
    slope, shift = np.polyfit(X, y, 1, w=1 / se)
    assert fit_emergence(X, y, se, draws=9).chi2_line == pytest.approx((((y - slope * X - shift) / se) ** 2).sum())


@pytest.mark.slow
def test_p_values_of_lines_are_uniform_and_intervals_cover():
    rng = np.random.default_rng(1)
    values, covered = [], 0
    for i in range(150):
        noise = 0.05 * rng.standard_normal(21)
        values.append(fit_emergence(X, 0.2 * X + noise, np.full(21, 0.05), draws=99, seed=i).p_value)
        broken = fit_emergence(X, 0.2 * np.maximum(0, X - 4) + noise, np.full(21, 0.05), draws=1)
        covered += broken.low <= 4 <= broken.high
    assert np.mean(np.array(values) <= 0.05) == pytest.approx(0.05, abs=0.045)
    assert np.mean(np.array(values) <= 0.5) == pytest.approx(0.5, abs=0.11)
    assert covered / 150 == pytest.approx(0.95, abs=0.05)


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ((X[:5], X[:5], np.ones(5)), "at least 6"),
        ((X, X, np.zeros(21)), "positive"),
        ((np.zeros(21), X, np.ones(21)), "differ"),
        ((X, np.full(21, np.nan), np.ones(21)), "finite"),
    ],
)
def test_bad_input_is_one_line(points, words):
    with pytest.raises(UserError, match=words):
        fit_emergence(*points)
