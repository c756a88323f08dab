"""Closed forms, robustness and the stated coverage of the power-law fits."""

import json

import numpy as np
import pytest

from qies.errors import UserError
from qies.scaling import fit_power

SIZES = np.array([5e4, 1e5, 2e5, 4e5])


def noisy(rng, x, law, scatter):
    return law * np.exp(scatter * rng.standard_normal(len(x)))


def test_exact_power_law_is_recovered():
    fit = fit_power(SIZES, 12.3 * SIZES**-0.071)
    assert fit.params["A"] == pytest.approx(12.3, rel=1e-6)
    assert fit.params["alpha"] == pytest.approx(0.071, rel=1e-6)
    assert fit.objective < 1e-20
    mean, lo, hi = fit.predict([[1e3, 1e9]])
    assert mean.shape == (1, 2)
    np.testing.assert_allclose(mean, [[12.3 * 1e3**-0.071, 12.3 * 1e9**-0.071]], rtol=1e-6)
    np.testing.assert_allclose(lo, hi, rtol=1e-6)


@pytest.mark.parametrize(
    ("e", "a", "alpha", "x"),
    [
        (1.69, 400.0, 0.34, np.geomspace(1e6, 1e10, 8)),
        (0.05, 30.0, 0.9, np.geomspace(1e1, 1e4, 6)),
        (3.0, 1e4, 1.2, np.geomspace(1e3, 1e6, 30)),
    ],
)
def test_exact_law_with_a_floor_is_recovered(e, a, alpha, x):
    fit = fit_power(x, e + a * x**-alpha, floor=True, interval="t")
    assert fit.params == pytest.approx({"E": e, "A": a, "alpha": alpha}, rel=1e-6)


def test_floor_of_data_without_one_is_zero_and_said_to_be_unidentified():
    x = np.geomspace(1e4, 1e8, 9)
    fit = fit_power(x, 20 * x**-0.2, floor=True)
    assert fit.params["E"] == 0.0
    assert any("floor E is not identified (the best floor is 0)" in w for w in fit.warnings)


def test_objective_is_the_huber_sum_and_matches_a_grid():
    rng = np.random.default_rng(3)
    loss = noisy(rng, SIZES, 9 * SIZES**-0.1, 0.05)
    fit = fit_power(SIZES, loss, delta=0.02)

    def huber_sum(log_a, alpha):
        r = np.abs(log_a - alpha * np.log(SIZES) - np.log(loss))
        return np.where(r <= 0.02, r**2 / 2, 0.02 * (r - 0.01)).sum()

    log_a, alpha = np.log(fit.params["A"]), fit.params["alpha"]
    assert fit.objective == pytest.approx(huber_sum(log_a, alpha))
    center = np.log(SIZES).mean()
    steps = np.linspace(-0.02, 0.02, 21)
    around = [huber_sum(log_a + s + t * center, alpha + t) for s in steps for t in steps]
    assert fit.objective <= min(around) + 1e-12


@pytest.mark.parametrize("seed", range(12))
def test_no_point_of_a_grid_beats_the_fit_with_a_floor(seed):
    """Noisy data have several valleys: plateaus, spikes at the smallest x, near-straight lines."""
    rng = np.random.default_rng(seed)
    x = np.sort(10 ** rng.uniform(4, 9, rng.integers(4, 12)))
    law = rng.uniform(0, 3) + 10 ** rng.uniform(0, 3) * x ** -rng.uniform(0.05, 1)
    loss = noisy(rng, x, law, rng.choice([0.003, 0.02, 0.1]))
    u = np.log(x / x.min())
    alpha, e = np.meshgrid(np.geomspace(0.005, 20, 120), loss.min() * np.linspace(0, 1.1, 120))
    term = np.exp(-alpha[..., None] * u)
    # The best A for relative errors at each (alpha, E), then the Huber sum there.
    amplitude = ((1 - e[..., None] / loss) * term / loss).sum(-1) / ((term / loss) ** 2).sum(-1)
    fitted = e[..., None] + np.maximum(amplitude, 1e-12)[..., None] * term
    r = np.abs(np.log(fitted / loss))
    grid = np.where(r <= 0.05, r**2 / 2, 0.05 * (r - 0.025)).sum(-1)
    assert fit_power(x, loss, floor=True).objective <= grid.min() * (1 + 1e-9)


def test_interval_of_four_sizes_is_the_textbook_one():
    loss = np.array([5.2, 4.8, 4.5, 4.2])
    fit = fit_power(SIZES, loss)
    design = np.stack([np.ones(4), -np.log(SIZES)], 1)
    theta, rss = np.linalg.lstsq(design, np.log(loss))[:2]
    error = np.sqrt(rss[0] / 2 * np.linalg.inv(design.T @ design)[1, 1])
    half = 4.302653 * error  # Student's t, 97.5 %, 2 degrees of freedom
    assert fit.ci["alpha"] == pytest.approx((theta[1] - half, theta[1] + half), rel=1e-5)
    assert (fit.interval, fit.dof) == ("t", 2)


def test_seeds_of_one_size_are_one_observation():
    loss = np.array([5.2, 4.8, 4.5, 4.2])
    seeds = np.concatenate([loss * 1.01, loss / 1.01, loss])
    fit, alone = fit_power(np.tile(SIZES, 3), seeds), fit_power(SIZES, loss)
    assert (fit.n, fit.sizes, fit.dof) == (12, 4, 2)
    assert fit.ci["alpha"] == pytest.approx(alone.ci["alpha"])


def test_one_broken_run_does_not_drag_the_law_along_and_is_named():
    x = np.geomspace(1e4, 1e8, 12)
    loss = 20 * x**-0.1
    loss[5] *= 1.6
    fit = fit_power(x, loss)
    assert fit.params["alpha"] == pytest.approx(0.1, abs=3e-3)
    assert any("1 of 12 points lie further" in w and "(+5" in w for w in fit.warnings)


def test_floor_from_four_sizes_warns():
    fit = fit_power(SIZES, [5.2, 4.8, 4.5, 4.2], floor=True)
    assert any("not identified (4 distinct x for 3 parameters)" in w for w in fit.warnings)
    assert "not identified" in fit.summary()


def test_as_many_parameters_as_sizes_gives_no_interval():
    fit = fit_power(SIZES[:2], [5.2, 4.8])
    assert fit.ci == {"A": None, "alpha": None}
    assert np.isnan(fit.predict(1e5)[1])
    assert any("no interval" in w for w in fit.warnings)
    stored = json.loads(json.dumps(fit.to_dict(), allow_nan=False))
    assert stored["ci"]["alpha"] is None
    assert set(stored["curve"]["lo"]) == {None}


def test_non_finite_runs_are_left_out_and_said():
    fit = fit_power([*SIZES, 8e5, np.inf], [*(12 * SIZES**-0.1), np.nan, 3.0])
    assert fit.dropped == (4, 5)
    assert fit.params["alpha"] == pytest.approx(0.1)
    assert "2 of 6 runs left out" in fit.warnings[0]


def test_rising_loss_is_fitted_as_it_is():
    fit = fit_power(SIZES, 2 * SIZES**0.05)
    assert fit.params["alpha"] == pytest.approx(-0.05)
    assert "x^0.05" in fit.summary()
    assert fit.warnings == ("the loss rises with x: alpha is negative",)


@pytest.mark.parametrize(("slope", "includes"), [(-0.03, True), (-0.2, False), (0.2, False)])
def test_an_interval_is_said_to_include_zero_only_where_it_does(slope, includes):
    fit = fit_power(SIZES, 4 * SIZES**slope * [0.98, 1.03, 1.0, 0.99])
    lo, hi = fit.ci["alpha"]
    assert (lo <= 0 <= hi) == includes == any("the 95% CI of alpha includes 0" in w for w in fit.warnings)
    assert (hi < 0) == any("alpha is negative" in w for w in fit.warnings)


@pytest.mark.parametrize("floor", [False, True])
@pytest.mark.parametrize("criterion", ["log", "loss"])
@pytest.mark.parametrize("interval", ["t", "bootstrap"])
def test_a_run_of_no_weight_does_not_move_the_law(floor, criterion, interval):
    x = np.geomspace(1e7, 3e9, 8)
    loss, weight = 50 * x**-0.15, np.ones(8)
    loss[0] *= 1.2
    weight[0] = 1e-9
    options = {"floor": floor, "criterion": criterion, "interval": interval, "draws": 20}
    fit = fit_power(x, loss, weight=weight, **options)
    assert fit.params["alpha"] == pytest.approx(0.15, abs=1e-5) and fit.params.get("E", 0) < 1e-3
    assert fit_power(x, loss, **options).params["alpha"] > 0.155


def test_weights_count_by_their_ratios_as_precisions():
    """Weighted least squares by hand, and seeds of one size averaged by weight."""
    loss, weight = np.array([5.2, 4.8, 4.5, 4.2]), np.array([1.0, 4.0, 2.0, 0.5])
    fit = fit_power(SIZES, loss, weight=weight, delta=1.0)
    root = np.sqrt(weight)
    design = np.stack([np.ones(4), -np.log(SIZES)], 1) * root[:, None]
    theta, rss = np.linalg.lstsq(design, np.log(loss) * root)[:2]
    half = 4.302653 * np.sqrt(rss[0] / 2 * np.linalg.inv(design.T @ design)[1, 1])
    assert fit.ci["alpha"] == pytest.approx((theta[1] - half, theta[1] + half), rel=1e-5)
    tenfold = fit_power(SIZES, loss, weight=10 * weight, delta=1.0)
    assert tenfold.ci["alpha"] == pytest.approx(fit.ci["alpha"])
    assert tenfold.objective == pytest.approx(10 * fit.objective)
    seeds = fit_power(np.append(SIZES, SIZES[0]), np.append(loss, 7.0), weight=np.append(np.ones(4), 1e-12))
    assert seeds.params["alpha"] == pytest.approx(fit_power(SIZES, loss, weight=[0.5, 1, 1, 1]).params["alpha"])


def test_residuals_of_the_loss_are_least_squares_on_it():
    rng = np.random.default_rng(2)
    x = np.geomspace(1e5, 1e9, 12)
    loss = 1.5 + 40 * x**-0.3 + 0.02 * rng.standard_normal(12)
    fit = fit_power(x, loss, floor=True, criterion="loss")
    assert fit.objective == pytest.approx(((fit.predict(x)[0] - loss) ** 2).sum() / 2)

    def squares(e, a, alpha):
        return ((e + a * x**-alpha - loss) ** 2).sum() / 2

    p = fit.params
    for step in (0.99, 1.01):
        assert squares(p["E"] * step, p["A"], p["alpha"]) > fit.objective
        assert squares(p["E"], p["A"] * step, p["alpha"]) > fit.objective
        assert squares(p["E"], p["A"], p["alpha"] * step) > fit.objective
    stored = json.loads(json.dumps(fit.to_dict(), allow_nan=False))
    assert (stored["criterion"], stored["delta"]) == ("loss", None)


def test_dictionary_is_json_and_its_curve_is_the_prediction():
    fit = fit_power(SIZES, [5.2, 4.8, 4.5, 4.2])
    stored = json.loads(json.dumps(fit.to_dict(), allow_nan=False))
    assert stored["form"] == "power"
    assert stored["params"] == fit.params
    mean, lo, hi = fit.predict(stored["curve"]["x"])
    np.testing.assert_allclose([stored["curve"][k] for k in ("loss", "lo", "hi")], [mean, lo, hi])
    assert (lo < mean).all() and (mean < hi).all()
    # The band is narrowest amid the data and opens beyond them.
    width = np.log(hi / lo)
    assert width[-1] > 2 * width.min()


@pytest.mark.parametrize(
    ("x", "loss", "options", "says"),
    [
        ([1, 2, 3], [1, 2], {}, "one loss for every x"),
        ([1, 0], [1, 2], {}, "x > 0"),
        ([1, 2], [1, -2], {}, "loss > 0"),
        ([5, 5, 5], [1, 2, 3], {}, "2 or more distinct x, found 1"),
        ([1, 2], [2, 1], {"floor": True}, "leave the floor out"),
        ([1, 2, 3], [3, 2, 1], {"interval": "bootstrp"}, "Did you mean 'bootstrap'"),
        ([1, 2, 3], [3, 2, 1], {"delta": 0}, "delta > 0"),
        ([1, 2, 3], [3, 2, 1], {"criterion": "los"}, "Did you mean 'loss'"),
        ([1, 2, 3], [3, 2, 1], {"weight": [1, 0, 1]}, "weight > 0"),
        ([1, 2, 3], [3, 2, 1], {"weight": [1, 1]}, "weight 2"),
    ],
)
def test_bad_input_is_refused_in_one_line(x, loss, options, says):
    with pytest.raises(UserError, match=says) as error:
        fit_power(x, loss, **options)
    assert "\n" not in str(error.value)


def coverage(floor, x, law, truth, scatter, datasets=200, **options):
    rng = np.random.default_rng(11)
    held = dict.fromkeys([*truth, "curve"], 0)
    beyond = 3 * x.max()
    for _ in range(datasets):
        fit = fit_power(x, noisy(rng, x, law(x), scatter), floor=floor, **options)
        for name, value in truth.items():
            held[name] += fit.ci[name][0] <= value <= fit.ci[name][1]
        _, lo, hi = fit.predict(beyond)
        held["curve"] += lo <= law(beyond) <= hi
    return {name: count / datasets for name, count in held.items()}


@pytest.mark.parametrize("seeds", [1, 3])
def test_intervals_of_four_sizes_cover_as_stated(seeds):
    found = coverage(False, np.tile(SIZES, seeds), lambda x: 12 * x**-0.08, {"A": 12.0, "alpha": 0.08}, 0.01)
    assert all(0.90 <= rate <= 0.98 for rate in found.values()), found


def test_intervals_with_a_floor_cover_as_stated():
    found = coverage(
        True,
        np.geomspace(1e5, 1e9, 10),
        lambda x: 1.7 + 60 * x**-0.3,
        {"E": 1.7, "A": 60.0, "alpha": 0.3},
        0.005,
        datasets=100,
    )
    assert all(0.90 <= rate <= 0.99 for rate in found.values()), found


def test_bootstrap_agrees_with_t_where_both_hold():
    rng = np.random.default_rng(5)
    x = np.geomspace(1e5, 1e9, 30)
    loss = noisy(rng, x, 12 * x**-0.08, 0.01)
    t, bootstrap = fit_power(x, loss, interval="t"), fit_power(x, loss, draws=200, seed=1)
    assert bootstrap.interval == "bootstrap"
    assert bootstrap.to_dict() == fit_power(x, loss, draws=200, seed=1).to_dict()
    for a, b in zip(t.ci["alpha"], bootstrap.ci["alpha"], strict=True):
        assert abs(a - b) < 0.4 * (t.ci["alpha"][1] - t.ci["alpha"][0])
    assert np.log(bootstrap.predict(1e10)[2] / bootstrap.predict(1e10)[1]) > 0


@pytest.mark.slow
def test_bootstrap_intervals_cover_as_stated():
    found = coverage(
        False, np.geomspace(1e5, 1e9, 24), lambda x: 12 * x**-0.08, {"A": 12.0, "alpha": 0.08}, 0.01, draws=200
    )
    assert all(0.90 <= rate <= 0.98 for rate in found.values()), found
