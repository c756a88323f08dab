"""Forms beside each other, and prediction of models that the fit did not see."""

import math

import numpy as np
import pytest
from scaling_tables import CHINCHILLA, grid, law, make_runs, noisy, published

from qies.errors import UserError
from qies.scaling import compare_forms, fit_surface, leave_largest_out, read_runs
from qies.scaling.laws.selection import huber_log_likelihood
from qies.scaling.options import FitOptions
from qies.scaling.pipeline import fit_file


def test_likelihood_is_the_normal_one_inside_delta_and_the_laplace_one_beyond():
    rss, n = 0.37, 50
    normal = -n / 2 * (math.log(2 * math.pi * rss / n) + 1)
    assert huber_log_likelihood(rss / 2, n, math.inf) == pytest.approx(normal)
    absolute, delta = 4.2, 1e-7
    laplace = -n * (math.log(2 * absolute / n) + 1)
    assert huber_log_likelihood(delta * absolute, n, delta) == pytest.approx(laplace, rel=1e-4)


def test_the_wider_form_wins_where_it_is_the_truth_and_not_elsewhere():
    rng = np.random.default_rng(0)
    n, d = grid(8, 8)
    unequal = make_runs(
        n, d, noisy(rng, law(n, d, {**CHINCHILLA, "A": 30.0, "alpha": 0.15, "beta": 0.6, "B": 4e5}), 0.003)
    )
    found = compare_forms(unequal, ("gadre", "approach3"))
    assert found.scores[0].form == "approach3" and found.tests[0].p < 1e-6
    points, *notes = found.figures()["forms"].panels[0].marks
    assert points.y == [0.0, found.scores[1].aic - found.scores[0].aic] and points.x == [5, 4]
    assert [note.text for note in notes] == ["approach3", "gadre"] and "<svg" in found.figures()["forms"].svg()
    equal = {"E": 1.8, "A": 400.0, "B": 900.0, "alpha": 0.3, "beta": 0.3}
    found = compare_forms(make_runs(n, d, noisy(rng, law(n, d, equal), 0.003)), ("gadre", "approach3"))
    [test] = found.tests
    assert (test.narrower, test.wider) == ("gadre", "approach3") and test.p > 1e-3
    assert found.summary().startswith("Lowest AIC: ")


def test_ratio_test_is_the_f_test_of_least_squares_where_delta_is_large():
    rng = np.random.default_rng(3)
    n, d = grid(8, 6)
    runs = make_runs(n, d, noisy(rng, law(n, d), 0.01))
    [test] = compare_forms(runs, ("gadre", "approach3"), delta=10.0).tests
    rss = [2 * fit_surface(runs, form, delta=10.0).objective for form in ("gadre", "approach3")]
    assert (test.restrictions, test.dof) == (1, 43)
    assert test.statistic == pytest.approx((rss[0] - rss[1]) / (rss[1] / 43), rel=1e-6)


def test_seeds_of_a_cell_count_once():
    rng = np.random.default_rng(4)
    n, d = grid(6, 5)
    loss = noisy(rng, law(n, d), 0.01)
    once = compare_forms(make_runs(n, d, loss), ("gadre", "approach3"))
    thrice = make_runs(np.tile(n, 3), np.tile(d, 3), np.concatenate([1.001 * loss, loss, loss / 1.001]))
    found = compare_forms(thrice, ("gadre", "approach3"))
    assert found.n == 30 and found.tests[0].p == pytest.approx(once.tests[0].p, rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("delta", [1e-3, 0.02])
def test_likelihood_ratio_has_its_size(delta):
    """Under the narrower form p falls below 5 % about 5 % of the time: 400 tables, binomial standard error 1.1 %, and
    a bound of 3 of them. (The chi-squared test of Laplace's likelihood would reject about 12 % at delta 1e-3.)"""
    rng = np.random.default_rng(1)
    n, d = grid(8, 6)
    truth = {"E": 1.8, "A": 400.0, "B": 900.0, "alpha": 0.3, "beta": 0.3}
    p = [
        compare_forms(make_runs(n, d, noisy(rng, law(n, d, truth), 0.005)), ("gadre", "approach3"), delta=delta)
        .tests[0]
        .p
        for _ in range(400)
    ]
    rejected = np.mean(np.array(p) < 0.05)
    print(f"rejected {100 * rejected:.1f} % (delta {delta})")
    assert 0.05 - 3 * 0.011 <= rejected <= 0.05 + 3 * 0.011


def test_leaving_the_largest_out_predicts_what_the_fit_did_not_see():
    rng = np.random.default_rng(2)
    n, d = grid()
    runs = make_runs(n, d, noisy(rng, law(n, d), 0.001))
    held = leave_largest_out(runs, "approach3", 2)
    sizes = np.unique(n)
    assert (held.n, len(held.runs)) == (20, 10) and {r.params for r in held.runs} == set(sizes[-2:])
    alone = fit_surface(runs.select(n < sizes[-2]))
    assert held.runs[0].predicted == pytest.approx(float(alone.predict(held.runs[0].params, held.runs[0].tokens)))
    assert held.worst_error < 0.02 and "Without the 2 largest sizes" in held.summary()
    points = held.figures()["held-out"].panels[0].marks[1]
    assert points.y == pytest.approx([100 * (r.loss / r.predicted - 1) for r in held.runs])
    assert list(points.x) == [r.predicted for r in held.runs] and "<svg" in held.figures()["held-out"].svg()
    with pytest.raises(UserError, match="between 1 and 5 of the 6 sizes"):
        leave_largest_out(runs, "approach3", 6)


def test_sizes_that_differ_by_rounding_are_left_out_together():
    rng = np.random.default_rng(2)
    n, d = grid()
    rounded = n * (1 + 0.015 * rng.random(len(n)))
    held = leave_largest_out(make_runs(rounded, d, law(n, d)), "approach3", 2)
    assert {r.params for r in held.runs} == set(rounded[n >= np.unique(n)[-2]])
    with pytest.raises(UserError, match="between 1 and 5 of the 6 sizes"):
        leave_largest_out(make_runs(rounded, d, law(n, d)), "approach3", 6)


def test_a_law_that_bends_is_shown_to_extrapolate_badly():
    n, d = grid()
    bent = law(n, d) * np.where(n > 2e9, 1.1, 1.0)
    assert leave_largest_out(make_runs(n, d, bent), "approach3", 1).mean_error == pytest.approx(1 - 1 / 1.1, abs=1e-3)


def test_too_few_runs_to_compare():
    n, d = grid()
    with pytest.raises(UserError, match="too few to compare"):
        compare_forms(make_runs(n, d, law(n, d)).select([0, 5, 12, 18, 22, 29]), ("approach3",))


def test_forms_compete_by_the_criterion_that_was_asked_for(tmp_path):
    """By least squares on L the objective is half the sum of squares of L - fit, its likelihood that of a normal."""
    n, d = grid()
    rng = np.random.default_rng(0)
    runs = make_runs(n, d, law(n, d) + 0.01 * rng.standard_normal(len(n)))
    found = compare_forms(runs, ("gadre", "approach3"), criterion="loss")
    assert found.criterion == "loss" and "residuals of loss" in found.summary()
    for score in found.scores:
        fit = fit_surface(runs, score.form, criterion="loss")
        squares = float(((runs.loss - fit.predict(n, d)) ** 2).sum())
        assert score.objective == pytest.approx(squares / 2, rel=1e-6)
        height = -len(n) / 2 * (np.log(2 * np.pi * squares / len(n)) + 1)
        assert score.log_likelihood == pytest.approx(height, rel=1e-5)
    path = tmp_path / "runs.csv"
    rows = [f"{row[0]},{row[1]},{row[2]}" for row in zip(n.tolist(), d.tolist(), runs.loss.tolist(), strict=True)]
    path.write_text("\n".join(["params,tokens,loss", *rows]))
    beside = fit_file(path, FitOptions(beside=("gadre",), criterion="loss", bootstrap=0)).comparison
    assert beside.scores[0].objective == pytest.approx(found.scores[0].objective, rel=1e-6)


def test_gadre_on_c4_is_shown_to_miss_the_largest_model():
    columns = {"params": "N", "tokens": "D", "loss": "loss_c4_val", "arm": "train_set"}
    runs = read_runs(published("gadre_104_runs.csv"), columns).of_arm("c4_original")
    multiplier, sizes = np.round(runs.tokens / runs.params), np.unique(runs.params)
    small = ((multiplier == 20) & (runs.params <= sizes[3])) | ((multiplier == 320) & (runs.params == sizes[0]))
    held = leave_largest_out(runs.select(small | (runs.params == sizes[-1])), "gadre", 1)
    assert held.n == 5 and held.mean_error == pytest.approx(0.043, abs=1e-3)
    assert "-4.30 %" in held.summary()
