"""Power against textbook numbers and a simulation."""

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from qies.scaling.comparison.statistical_power import cells_needed, detectable_effect, pairs_needed, t_power


@pytest.mark.parametrize(("effect", "pairs"), [(0.5, 34), (0.8, 15), (1.0, 10)])
def test_pairs_of_a_paired_t_test_are_the_textbooks(effect, pairs):
    assert pairs_needed(effect, 1.0, 0.95) == pairs  # two-sided 5 %, power 80 % (Cohen 1988; G*Power)


def test_power_is_what_a_simulation_finds():
    rng = np.random.default_rng(0)
    shown = ttest_1samp(0.9 + rng.standard_normal((20000, 8)), 0, axis=1).pvalue < 0.05
    assert t_power(0.9, 1 / np.sqrt(8), 7, 0.95) == pytest.approx(shown.mean(), abs=0.01)


def test_edges():
    assert pairs_needed(1e-4, 1.0, 0.95) is None
    assert pairs_needed(1.0, 0.0, 0.95) == 2
    assert t_power(0.0, 1.0, 10, 0.95) == pytest.approx(0.05, rel=1e-3)
    assert t_power(50.0, 1.0, 10, 0.95) == pytest.approx(1)
    assert t_power(1.0, 1.0, 0, 0.95) == 0.0


def test_detectable_effect_has_the_target_power():
    assert t_power(detectable_effect(0.3, 5, 0.95), 0.3, 5, 0.95) == pytest.approx(0.8, rel=1e-6)


def test_cells_needed_is_the_least_number_that_reaches_the_target():
    n = cells_needed(0.02, 0.01, 6, 4, 0.95)

    def reached(cells):
        return t_power(0.02, 0.01 * np.sqrt(6 / cells), cells - 2, 0.95)

    assert reached(n) >= 0.8 > reached(n - 1)
