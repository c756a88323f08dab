"""The annealing law of whole curves and the sigmoid from bits per byte to accuracy."""

import json

import numpy as np
import pytest

from qies.errors import UserError
from qies.scaling import fit_annealing, fit_downstream
from qies.scaling.laws.curves import schedule_sums


def wsd(steps=4000, decay=1000, peak=1e-3):
    s = np.arange(10.0, steps + 1, 10)
    return s, peak * np.minimum(1.0, (steps - s) / decay)


def test_sums_are_the_definition():
    lr = np.array([1.0, 1.0, 0.5, 0.25])
    s1, s2 = schedule_sums(np.arange(1.0, 5), lr, memory=0.9)
    np.testing.assert_allclose(s1, [1, 2, 2.5, 2.75])
    np.testing.assert_allclose(s2, np.cumsum([0, 0, 0.5, 0.9 * 0.5 + 0.25]))


def test_a_known_curve_is_recovered_and_predicts_another_schedule():
    s, lr = wsd()
    s1, s2 = schedule_sums(s, lr)
    fit = fit_annealing(s, lr, 2.5 + 0.8 * s1**-0.4 - 0.3 * s2)
    assert fit.params == pytest.approx({"E": 2.5, "A": 0.8, "alpha": 0.4, "C": 0.3}, rel=1e-4)
    s, lr = wsd(6000, 3000)
    s1, s2 = schedule_sums(s, lr)
    np.testing.assert_allclose(fit.predict(s, lr), 2.5 + 0.8 * s1**-0.4 - 0.3 * s2, rtol=1e-5)


def test_noisy_curve_covers_the_truth():
    s, lr = (part[::4] for part in wsd())
    s1, s2 = schedule_sums(s, lr)
    truth = {"E": 2.5, "A": 0.8, "alpha": 0.4, "C": 0.3}
    rng = np.random.default_rng(0)
    held = dict.fromkeys(truth, 0)
    for _ in range(12):
        noise = np.exp(5e-4 * rng.standard_normal(len(s)))
        fit = fit_annealing(s, lr, (2.5 + 0.8 * s1**-0.4 - 0.3 * s2) * noise)
        for name, value in truth.items():
            held[name] += fit.ci[name][0] <= value <= fit.ci[name][1]
    assert all(count >= 9 for count in held.values()), held


def test_a_constant_rate_identifies_no_annealing():
    s = np.arange(1.0, 400)
    fit = fit_annealing(s, np.full_like(s, 1e-2), 2 + (1e-2 * s) ** -0.5)
    assert fit.params["C"] == 0.0 and fit.params["alpha"] == pytest.approx(0.5, rel=1e-4)
    assert any("C is not identified" in w for w in fit.warnings)


def test_a_known_sigmoid_is_recovered():
    x = np.linspace(0.5, 1.3, 25)
    y = 0.25 + 0.65 / (1 + np.exp(9 * (x - 0.8)))
    fit = fit_downstream(x, y, ceiling=None)
    assert fit.params == pytest.approx({"slope": 9, "midpoint": 0.8, "floor": 0.25, "ceiling": 0.9}, rel=1e-5)
    assert fit.predict(0.8) == pytest.approx(0.575, rel=1e-5)
    known = fit_downstream(x, y, floor=0.25, ceiling=0.9)
    assert set(known.ci) == {"slope", "midpoint"} and known.params["slope"] == pytest.approx(9)
    json.dumps(known.to_dict(), allow_nan=False)
    assert known.figures()["downstream"].panels[0].y.title == "accuracy"


def test_rows_of_no_weight_do_not_move_a_curve():
    x = np.linspace(0.5, 1.3, 25)
    y = 0.25 + 0.65 / (1 + np.exp(9 * (x - 0.8)))
    y[12] = 0.9
    weight = np.where(np.arange(25) == 12, 1e-9, 1.0)
    fit = fit_downstream(x, y, weight=weight, ceiling=None)
    assert fit.params == pytest.approx({"slope": 9, "midpoint": 0.8, "floor": 0.25, "ceiling": 0.9}, rel=1e-4)
    assert fit_downstream(x, y, ceiling=None).params["midpoint"] > 0.81
    assert fit_downstream(x, y, weight=3 * weight, ceiling=None).ci["slope"] == pytest.approx(fit.ci["slope"], rel=1e-3)
    s, lr = wsd()
    s1, s2 = schedule_sums(s, lr)
    loss = 2.5 + 0.8 * s1**-0.4 - 0.3 * s2
    loss[:40] *= 1.1
    fit = fit_annealing(s, lr, loss, weight=np.where(s <= 400, 1e-12, 1.0))
    assert fit.params == pytest.approx({"E": 2.5, "A": 0.8, "alpha": 0.4, "C": 0.3}, rel=1e-4)


def test_bad_curves_are_refused():
    s, lr = wsd()
    with pytest.raises(UserError, match="rising steps"):
        fit_annealing(s[::-1], lr, np.ones_like(s))
    with pytest.raises(UserError, match="5 or more rows"):
        fit_annealing(s[:4], lr[:4], np.ones(4))
    with pytest.raises(UserError, match="between 0 and 1"):
        fit_downstream([1.0, 2, 3, 4], [25, 50, 75, 90])
    with pytest.raises(UserError, match="weight must be positive"):
        fit_downstream([1.0, 2, 3, 4], [0.9, 0.5, 0.3, 0.2], weight=[1, 1, 0, 1])
    with pytest.raises(UserError, match="3 parameters needs as many"):
        fit_downstream([1.0, 2], [0.2, 0.3])
