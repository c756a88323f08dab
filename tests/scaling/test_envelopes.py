"""Approaches 1 and 2 against the closed-form optimum of a known law."""

import dataclasses
import json

import numpy as np
import pytest
from scaling_tables import make_runs

from qies.errors import UserError
from qies.scaling import fit_approach1, fit_approach2
from qies.scaling.laws.envelopes import isoflop_groups

LAW = {"E": 1.7, "A": 400.0, "B": 900.0, "alpha": 0.34, "beta": 0.34}


def isoflop(width, sizes=9, shift=1.0, law=LAW):
    """Five budgets, sizes from 1/width to width times `shift` times the optimum."""
    compute = np.geomspace(1e18, 1e21, 5)
    a = law["beta"] / (law["alpha"] + law["beta"])
    g = (law["alpha"] * law["A"] / (law["beta"] * law["B"])) ** (1 / (law["alpha"] + law["beta"]))
    best = g * (compute / 6) ** a
    n = (best[:, None] * shift * np.geomspace(1 / width, width, sizes)).reshape(-1)
    c = np.repeat(compute, sizes)
    d = c / 6 / n
    return make_runs(n, d, law["E"] + law["A"] * n ** -law["alpha"] + law["B"] * d ** -law["beta"]), compute, best


def test_parabolas_find_the_optimum_of_a_symmetric_law():
    runs, compute, best = isoflop(3)
    fit = fit_approach2(runs)
    np.testing.assert_allclose([p.params for p in fit.points], best, rtol=1e-6)
    np.testing.assert_allclose([p.compute for p in fit.points], compute)
    assert fit.exponents == pytest.approx({"a": 0.5, "b": 0.5})
    np.testing.assert_allclose(fit.optimum(compute)[0], best, rtol=1e-6)
    np.testing.assert_allclose(6 * np.prod(fit.optimum(compute), axis=0), compute)
    assert not fit.warnings


def test_approach_2_takes_the_tokens_and_flops_of_the_table():
    n, d = np.array([1e7, 2e7, 4e7]), np.array([1e9, 5e8, 2.5e8])
    n, d, c = np.append(n, 10 * n), np.append(d, 10 * d), np.repeat([1.2e17, 1.2e19], 3)
    fit = fit_approach2(make_runs(n, d, np.array([4.0, 3.9, 4.0, 3.0, 2.9, 3.0]), flops=c))
    assert [p.params for p in fit.points] == pytest.approx([2e7, 2e8])
    assert [p.tokens for p in fit.points] == pytest.approx([5e8, 5e9])
    assert [float(v) for v in fit.optimum(1.2e17)] == pytest.approx([2e7, 5e8])


def test_the_bias_is_measured_along_the_budget_of_the_table():
    """FLOPs of 6ND and of attention beside it: k = C/(ND) falls with N, so a budget buys fewer tokens at small N."""
    runs, _, _ = isoflop(30, sizes=41, shift=4.0)
    d = runs.flops / (6 * runs.params * (1 + (runs.params / 1e8) ** -0.3))
    loss = LAW["E"] + LAW["A"] * runs.params ** -LAW["alpha"] + LAW["B"] * d ** -LAW["beta"]
    fit = fit_approach2(make_runs(runs.params, d, loss, flops=runs.flops))
    for point, bias in zip(fit.points, fit.bias, strict=True):
        n = np.geomspace(point.params / 30, point.params * 30, 20001)
        tokens = point.compute / (6 * n * (1 + (n / 1e8) ** -0.3))
        true = n[np.argmin(LAW["E"] + LAW["A"] * n ** -LAW["alpha"] + LAW["B"] * tokens ** -LAW["beta"])]
        assert bias == pytest.approx(point.params / true, rel=0.01)
        assert 6 * point.params * (1 + (point.params / 1e8) ** -0.3) * point.tokens == pytest.approx(
            point.compute, rel=1e-3
        )


def test_the_bias_on_wide_and_shifted_grids_is_warned_of_and_measured():
    runs, _, best = isoflop(30, shift=4.0)
    fit = fit_approach2(runs)
    assert any("approach 2 is known to misplace" in w for w in fit.warnings)
    true_bias = np.array([p.params for p in fit.points]) / best
    np.testing.assert_allclose(fit.bias, true_bias, rtol=1e-3)
    assert abs(np.log(true_bias)).max() > np.log(1.02)
    assert any("off by" in w for w in fit.warnings)


def test_akima_has_less_of_the_bias():
    runs, _, best = isoflop(30, sizes=25, shift=4.0)
    off = {
        m: np.abs(np.log([p.params for p in fit_approach2(runs, method=m).points] / best)).max()
        for m in ("parabola", "akima")
    }
    assert off["akima"] < 0.2 * off["parabola"]


@pytest.mark.parametrize("fit", [fit_approach1, fit_approach2, lambda runs: fit_approach2(runs, method="akima")])
def test_runs_of_no_weight_do_not_move_the_exponent(fit):
    runs, compute, _ = isoflop(3, sizes=41)
    last = np.isclose(runs.flops, compute[-1])
    wrong = dataclasses.replace(runs, params=np.where(last, 4 * runs.params, runs.params))
    ignored = dataclasses.replace(wrong, weight=np.where(last, 1e-9, 1.0))
    assert fit(wrong).exponents["a"] > 0.55
    found = fit(ignored)
    assert found.exponents["a"] == pytest.approx(fit(runs.select(~last)).exponents["a"], abs=1e-6)
    tenfold = dataclasses.replace(ignored, weight=10 * ignored.weight)
    assert fit(tenfold).ci["a"] == pytest.approx(found.ci["a"])


def test_weights_count_inside_a_budget():
    runs, _, best = isoflop(3)
    loss = runs.loss.copy()
    loss[0] *= 1.05
    wrong = dataclasses.replace(runs, loss=loss, weight=np.where(np.arange(len(loss)) == 0, 1e-9, 1.0))
    assert fit_approach2(wrong).points[0].params == pytest.approx(best[0], rel=0.01)
    even = dataclasses.replace(wrong, weight=np.ones(len(loss)))
    assert abs(np.log(fit_approach2(even).points[0].params / best[0])) > 0.02
    [said] = [w for w in fit_approach2(wrong, method="akima").warnings if "weights count among seeds" in w]
    assert said and any("decided by loss alone" in w for w in fit_approach1(wrong).warnings)


def test_budgets_without_a_minimum_are_left_out_with_the_reason():
    runs, _, best = isoflop(3)
    beyond = runs.select((runs.flops > 2e18) | (runs.params > 1.3 * best[0]))
    fit = fit_approach2(beyond)
    assert len(fit.points) == 4 and any("lies outside the sizes tried" in w for w in fit.warnings)
    with pytest.raises(UserError, match="2 budgets with a minimum inside, found 1"):
        fit_approach2(runs.select(runs.flops < 2e18))
    with pytest.raises(UserError, match="Did you mean 'akima'"):
        fit_approach2(runs, method="akina")


def test_budgets_are_told_apart_by_gaps():
    groups = isoflop_groups(np.array([1e19, 1.02e18, 1e18, 1.05e19, 0.99e18]))
    assert [sorted(g.tolist()) for g in groups] == [[1, 2, 4], [0, 3]]


def test_the_envelope_holds_the_runs_that_nothing_cheaper_beats():
    runs, _, _ = isoflop(3, sizes=41)
    fit = fit_approach1(runs)
    on = {(p.compute, p.params) for p in fit.points}
    for i in range(len(runs)):
        beaten = ((runs.flops <= 1.02 * runs.flops[i]) & (runs.loss < runs.loss[i])).any()
        assert ((runs.flops[i], runs.params[i]) in on) != beaten
    assert fit.exponents["a"] == pytest.approx(0.5, abs=0.03)
    json.dumps(fit.to_dict(), allow_nan=False)
    assert "approach1: N ~ C^a" in fit.summary() and any("no rivals" in w for w in fit.warnings)
    with pytest.raises(UserError, match="needs 3"):
        fit_approach1(runs.select([0, 0]))


def test_plots_name_their_axes():
    figure = fit_approach2(isoflop(3)[0]).figures()["approach2"]
    [panel] = figure.panels
    assert "FLOPs" in panel.x.title and len(panel.marks) == 4
