"""Levels, cells and paired tests against scipy's."""

import dataclasses

import numpy as np
import pytest
from scipy.stats import ttest_ind, ttest_rel
from two_arms import runs_of

from qies.scaling.comparison.matching import cells_of, match, paired_tests, seed_noise
from qies.scaling.tables.size_levels import levels

LEFT, RIGHT = np.array([3.10, 3.14, 3.05, 3.12]), np.array([3.15, 3.17, 3.11, 3.15])


def arms(seeds_a=(0, 1, 2, 3), seeds_b=(0, 1, 2, 3), sizes=(1e6, 1.004e6)):
    """One cell with four runs an arm at most; the arms' sizes differ by 0.4 %."""
    of = {"q": (LEFT, seeds_a, sizes[0]), "t": (RIGHT, seeds_b, sizes[1])}
    rows = [
        (n, 1e8, 6e8 * n, loss[i], arm, s, np.nan) for arm, (loss, seeds, n) in of.items() for i, s in enumerate(seeds)
    ]
    runs = runs_of(*zip(*rows, strict=True))
    return runs.of_arm("q"), runs.of_arm("t")


def one_test(a, b):
    (row,) = paired_tests(a, b, *cells_of(a, b), 0.95)
    return row


def test_levels_hold_two_percent():
    assert levels(np.array([1.0, 2.0, 1.015, 1.03, 2.01])).tolist() == [0, 2, 0, 1, 2]


def test_seeds_in_both_arms_are_paired():
    row, reference = one_test(*arms()), ttest_rel(LEFT, RIGHT)
    assert (row.test, row.n, row.p) == ("paired t", 4, pytest.approx(reference.pvalue))
    assert row.difference == pytest.approx((LEFT - RIGHT).mean())
    ends = reference.confidence_interval(0.95)
    assert (row.lo, row.hi) == (pytest.approx(ends.low), pytest.approx(ends.high))
    assert row.flops_ratio == pytest.approx(1 / 1.004)


def test_a_missing_seed_pairs_the_others():
    row = one_test(*arms(seeds_a=(0, 1, 2), seeds_b=(2, 0, 1, 3)))
    reference = ttest_rel([3.10, 3.14, 3.05], [3.17, 3.11, 3.15])
    assert (row.test, row.n, row.p) == ("paired t", 3, pytest.approx(reference.pvalue))


@pytest.mark.parametrize("seeds", [(4, 5, 6, 7), (0, 0, 0, 0)])
def test_seeds_not_shared_or_not_told_apart_are_compared_by_welch(seeds):
    row, reference = one_test(*arms(seeds_b=seeds)), ttest_ind(LEFT, RIGHT, equal_var=False)
    assert (row.test, row.p) == ("Welch t", pytest.approx(reference.pvalue))
    assert row.lo == pytest.approx(reference.confidence_interval(0.95).low)


def test_seeds_that_differ_by_nothing_measure_no_noise():
    a, b = arms()
    a, b = dataclasses.replace(a, loss=np.full(4, 3.1)), dataclasses.replace(b, loss=np.full(4, 3.2))
    row = one_test(a, b)
    assert (row.test, row.lo, row.hi, row.p, row.sd) == ("no spread", None, None, None, None)
    assert one_test(a, dataclasses.replace(b, loss=a.loss)).p == 1.0


def test_one_seed_gives_a_difference_and_nothing_else():
    row = one_test(*arms(seeds_a=(0,), seeds_b=(0,)))
    assert row.difference == pytest.approx(-0.05)
    assert (row.test, row.lo, row.hi, row.p, row.sd) == ("one seed", None, None, None, None)
    assert row.to_dict()["interval"] is None
    a, b = arms(seeds_a=(0,), seeds_b=(0,))
    assert seed_noise(a, b, *cells_of(a, b)) is None


def test_sizes_that_differ_do_not_match():
    a, b = arms(sizes=(1e6, 1.1e6))
    ca, cb = cells_of(a, b)
    assert match(ca, cb).shape == (0, 2) and paired_tests(a, b, ca, cb, 0.95) == ()


def test_noise_of_seeds_is_the_covariance_of_cell_means():
    a, b = arms()
    covariance, dof = seed_noise(a, b, *cells_of(a, b))
    np.testing.assert_allclose(covariance, np.cov(np.log(LEFT), np.log(RIGHT)) / 4)
    assert dof == 3


def test_weights_count_in_a_cells_mean():
    a, b = arms()
    a = dataclasses.replace(a, weight=np.array([1.0, 0.0, 0.0, 1.0]))
    ca, _ = cells_of(a, b)
    assert ca.log_loss[0] == pytest.approx(np.log([3.10, 3.12]).mean())
