"""Laws of N and D: derivatives, exact recovery, the global optimum, intervals, and the published tables."""

import json
import math

import numpy as np
import pytest
from scaling_tables import CHINCHILLA, grid, law, make_runs, noisy, published

from qies.errors import UserError
from qies.scaling import fit_surface, read_runs
from qies.scaling.laws.forms import FORMS, surface_form
from qies.scaling.laws.solver import huber, minimise

GAMMA = {"E": 1.7, "A": 3e4, "B": 9e4, "alpha": 0.55, "beta": 0.5, "gamma": 0.7}


def centred(n, d):
    logs = np.log(np.stack([n, d], axis=1))
    return logs - logs.mean(axis=0), logs.mean(axis=0)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_derivatives_agree_with_differences(form):
    rng = np.random.default_rng(0)
    x, _ = centred(*grid(4, 3))
    if form.repeats:
        x = np.column_stack([x, np.maximum(rng.normal(0.5, 1.5, 12), 0)])
    theta = np.abs(rng.normal(0.5, 0.2, (3, len(form.names))))
    step = 1e-6 * np.eye(theta.shape[1])
    c = rng.standard_normal((3, len(x)))
    jacobian = form.evaluate(theta, x)[1]
    for i, e in enumerate(step):
        (up, ju), (down, jd) = form.evaluate(theta + e, x), form.evaluate(theta - e, x)
        np.testing.assert_allclose(jacobian[..., i], (up - down) / 2e-6, atol=1e-8)
        np.testing.assert_allclose(
            form.expand(theta, x)[2](c)[:, i], ((ju - jd) * c[..., None]).sum(1) / 2e-6, atol=1e-7
        )


@pytest.mark.parametrize(
    ("form", "params"),
    [
        ("approach3", CHINCHILLA),
        ("approach3", {"E": 0.4, "A": 20.0, "B": 4e6, "alpha": 0.12, "beta": 0.8}),
        ("approach3-gamma", GAMMA),
        ("gadre", {"E": 1.8, "a": 150.0, "b": 350.0, "eta": -0.27}),
    ],
)
def test_exact_laws_are_recovered(form, params):
    n, d = grid(7, 6)
    same = params if form != "gadre" else {
        "E": params["E"], "A": params["a"], "B": params["b"] * 6 ** (params["eta"] / 2),
        "alpha": -params["eta"], "beta": -params["eta"],
    }  # fmt: skip
    fit = fit_surface(make_runs(n, d, law(n, d, same)), form)
    assert fit.params == pytest.approx(params, rel=1e-4)
    np.testing.assert_allclose(fit.predict(3 * n, 0.2 * d), law(3 * n, 0.2 * d, same), rtol=1e-5)


def repeated(n, d, u, e=1.87, a=521.0, b=1488.0, alpha=0.353, beta=0.353, r_n=5.31, r_d=15.39):
    """Muennighoff et al.'s law, equations 5 to 7, with their constants."""
    best = (alpha * a / (beta * b)) ** (1 / alpha) * u ** (beta / alpha)
    u_n = np.minimum(best, n)
    size = u_n + u_n * r_n * (1 - np.exp(-(n / u_n - 1) / r_n))
    data = u + u * r_d * (1 - np.exp(-(d / u - 1) / r_d))
    return e + a / size**alpha + b / data**beta


def data_constrained():
    n, u, epochs = (
        g.reshape(-1) for g in np.meshgrid(np.geomspace(1e7, 5e9, 5), [1e8, 1e9, 1e10], [1, 3, 12, 50, 200])
    )
    return n, u * epochs, u


def test_repeated_data_follow_the_data_constrained_law():
    n, d, u = data_constrained()
    fit = fit_surface(make_runs(n, d, repeated(n, d, u), unique=u), "data-constrained")
    truth = {"E": 1.87, "A": 521, "B": 1488, "alpha": 0.353, "beta": 0.353, "R_N": 5.31, "R_D": 15.39}
    assert fit.params == pytest.approx(truth, rel=1e-3) and fit.cells == 75
    np.testing.assert_allclose(fit.predict(3e8, 4e10, 5e8), repeated(3e8, 4e10, 5e8), rtol=1e-4)
    np.testing.assert_allclose(fit.predict(3e8, 4e10), repeated(3e8, 4e10, 4e10), rtol=1e-4)
    noisy_runs = make_runs(n, d, noisy(np.random.default_rng(0), repeated(n, d, u), 0.003), unique=u)
    fit = fit_surface(noisy_runs, "data-constrained")
    assert all(fit.ci[name][0] < truth[name] < fit.ci[name][1] for name in ("R_D", "R_N", "alpha", "beta"))


def test_unique_tokens_are_needed_for_the_data_constrained_law():
    n, d, u = data_constrained()
    for unique in (None, np.where(u > 1e9, np.nan, u)):
        with pytest.raises(UserError, match="needs the unique tokens of every run"):
            fit_surface(make_runs(n, d, repeated(n, d, u), unique=unique), "data-constrained")


def test_optimum_is_the_lowest_loss_along_the_isoflop_line():
    n, d = grid()
    fit = fit_surface(make_runs(n, d, law(n, d)))
    for c in (1e19, 1e22):
        best_n, best_d, loss = fit.optimum(c)
        assert 6 * best_n * best_d == pytest.approx(c)
        line = best_n * np.geomspace(0.2, 5, 401)
        along = fit.predict(line, c / 6 / line)
        assert np.argmin(along) == 200 and along[200] == pytest.approx(loss)
    ratio = np.log(fit.optimum(1e22)[0] / fit.optimum(1e19)[0]) / np.log(1e3)
    assert ratio == pytest.approx(fit.exponents["a"]) == pytest.approx(0.366 / 0.714, rel=1e-4)
    np.testing.assert_allclose(fit.frontier([1e19, 1e22]), [fit.optimum(1e19)[2], fit.optimum(1e22)[2]])


def test_objective_is_the_huber_sum():
    rng = np.random.default_rng(1)
    n, d = grid()
    loss = noisy(rng, law(n, d), 0.01)
    fit = fit_surface(make_runs(n, d, loss), delta=5e-3)
    r = np.abs(np.log(fit.predict(n, d) / loss))
    assert fit.objective == pytest.approx(np.where(r <= 5e-3, r**2 / 2, 5e-3 * (r - 2.5e-3)).sum())
    assert huber(np.array([3.0]), math.inf) == 4.5


@pytest.mark.parametrize(
    ("form", "seed"),
    [*((form, seed) for form in ("approach3", "gadre") for seed in range(4)), ("approach3-gamma", 2)]
    + [pytest.param("approach3-gamma", seed, marks=pytest.mark.slow) for seed in (0, 1, 3, 4, 5)],
)
def test_no_random_start_beats_the_fit(form, seed):
    """Few points, wide noise, odd exponents: many valleys."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(8, 25))
    n, d = 10 ** rng.uniform(6, 10, count), 10 ** rng.uniform(8, 12, count)
    truth = {"E": rng.uniform(0.1, 2.5), "A": 10 ** rng.uniform(1, 4), "B": 10 ** rng.uniform(1, 6),
             "alpha": rng.uniform(0.1, 0.8), "beta": rng.uniform(0.1, 0.8)}  # fmt: skip
    loss = noisy(rng, law(n, d, truth), rng.choice([0.003, 0.02, 0.1]))
    fit = fit_surface(make_runs(n, d, loss), form, delta=1e-3)
    x, _ = centred(n, d)
    shape = surface_form(form)
    low, high = shape.bounds(loss)
    low, high = np.maximum(low, -6), np.minimum(high, 3)
    starts = rng.uniform(low, np.maximum(high, low + 1e-6), (150, len(low)))
    found = minimise(shape, starts, x, loss, np.ones((1, count)), 1e-3, "log")[1]
    assert fit.objective <= found.min() * (1 + 1e-6)


def test_a_minimum_far_along_the_ridge_of_gamma_is_found():
    """As gamma falls and the exponents rise the bracket becomes the larger of its two powers, the best law here."""
    rng = np.random.default_rng(31)
    n = 10 ** rng.uniform(6, 11, 50)
    d = n * 10 ** rng.uniform(1, 1.6, 50)
    truth = {"E": 2.47, "A": 2832.0, "B": 16.6, "alpha": 0.412, "beta": 0.166, "gamma": 0.804}
    loss = noisy(rng, law(n, d, truth), 0.1)
    fit = fit_surface(make_runs(n, d, loss), "approach3-gamma")
    x, _ = centred(n, d)
    e = np.linspace(-2, np.log(loss.min()), 12)
    starts = np.column_stack([e, np.full((12, 5), [10, 15, 8, 5, 0.05])])
    found = minimise(surface_form("approach3-gamma"), starts, x, loss, np.ones((1, 50)), 1e-3, "log")[1]
    assert fit.objective <= found.min() * (1 + 1e-6)


def test_the_worst_runs_are_dropped_and_named():
    rng = np.random.default_rng(3)
    n, d = grid()
    loss = noisy(rng, law(n, d), 0.002)
    loss[[4, 11]] *= [1.3, 0.8]
    fit = fit_surface(make_runs(n, d, loss), drop_worst=2)
    assert [(r.index, r.name) for r in fit.dropped] == [(4, "row 5"), (11, "row 12")]
    assert "+30" in fit.dropped[0].reason and fit.n == 28
    without = fit_surface(make_runs(n, d, loss).select(np.delete(np.arange(30), [4, 11])))
    assert fit.params == without.params


def test_worst_runs_that_stand_together_do_not_push_a_good_one_out():
    """The pattern of the digitised Chinchilla runs: large models on very few tokens, all far above the law."""
    rng = np.random.default_rng(3)
    n, d = np.geomspace(5e7, 1e10, 60), 10 ** rng.uniform(9.5, 11.5, 60)
    n, d = np.append(n, [7e9, 3e9, 2.6e9, 2.3e9, 2e9]), np.append(d, [2.5e8, 5e8, 6e8, 7e8, 8e8])
    loss = noisy(rng, law(n, d), 0.003)
    loss[60:] *= [1.32, 1.37, 1.13, 1.15, 1.06]
    fit = fit_surface(make_runs(n, d, loss), drop_worst=5)
    assert [r.index for r in fit.dropped] == [60, 61, 62, 63, 64]


def test_an_outlier_is_named_and_hardly_moves_the_law():
    rng = np.random.default_rng(4)
    n, d = grid()
    loss = noisy(rng, law(n, d), 0.002)
    clean = fit_surface(make_runs(n, d, loss))
    loss[9] *= 1.1
    fit = fit_surface(make_runs(n, d, loss))
    assert [r.name for r in fit.residuals if r.outlier] == ["row 10"]
    assert "row 10 (+" in fit.summary()
    assert fit.params["alpha"] == pytest.approx(clean.params["alpha"], abs=0.02)


def test_weights_count_as_repeats():
    rng = np.random.default_rng(6)
    n, d = grid()
    loss = noisy(rng, law(n, d), 0.01)
    weight = np.ones(30)
    weight[:5] = 2
    weighted = fit_surface(make_runs(n, d, loss, weight=weight))
    repeated = fit_surface(make_runs(n, d, loss).select(np.r_[0:30, 0:5]))
    assert weighted.params == pytest.approx(repeated.params, rel=1e-5)
    assert weighted.objective == pytest.approx(repeated.objective)


def test_intervals_depend_on_ratios_of_weights_alone():
    rng = np.random.default_rng(6)
    n, d = grid()
    loss = noisy(rng, law(n, d), 0.003)
    loss[3] *= 1.2
    weight = np.where(np.arange(30) == 3, 1e-9, 1.0)
    for delta, near in ((1e-3, 0.15), (1.0, 0.03)):  # the density of few residuals is rough
        fit = fit_surface(make_runs(n, d, loss, weight=weight), delta=delta)
        tenfold = fit_surface(make_runs(n, d, loss, weight=10 * weight), delta=delta)
        alone = fit_surface(make_runs(n, d, loss).select(np.arange(30) != 3), delta=delta)
        assert fit.params == pytest.approx(alone.params, rel=1e-4)
        assert tenfold.ci["alpha"] == pytest.approx(fit.ci["alpha"], rel=1e-4)
        assert np.ptp(fit.ci["alpha"]) == pytest.approx(np.ptp(alone.ci["alpha"]), rel=near)


def test_one_tokens_per_parameter_ratio_is_said_not_to_identify_the_law():
    rng = np.random.default_rng(0)
    n = np.geomspace(1e7, 1e9, 12)
    fit = fit_surface(make_runs(n, 20 * n, noisy(rng, law(n, 20 * n), 0.002)))
    assert any("tokens follow size (correlation 1.000" in w for w in fit.warnings)
    apart = fit_surface(make_runs(*grid(), noisy(rng, law(*grid()), 0.002)))
    assert not any("follow size" in w for w in apart.warnings)


def test_runs_too_close_to_each_other_are_said_not_to_identify_the_law():
    rng = np.random.default_rng(0)
    wide = fit_surface(make_runs(*grid(), noisy(rng, law(*grid()), 0.002)))
    assert wide.condition < 1e3 and not any("condition number" in w for w in wide.warnings)
    n, d = (g.reshape(-1) for g in np.meshgrid(np.geomspace(1e8, 1.5e8, 5), np.geomspace(2e9, 3e9, 5)))
    close = fit_surface(make_runs(n, d, noisy(rng, law(n, d), 1e-5)))
    assert close.condition > 1e3 and any("not identified (condition number" in w for w in close.warnings)


def test_no_floor_is_said():
    n, d = grid()
    fit = fit_surface(make_runs(n, d, law(n, d, {**CHINCHILLA, "E": 0.0})))
    assert fit.params["E"] < 1e-2
    assert any("the best floor is 0" in w for w in fit.warnings)


def test_as_many_runs_as_parameters_gives_no_interval():
    n, d = grid()
    fit = fit_surface(make_runs(n, d, law(n, d)).select([0, 7, 14, 21, 29]), bootstrap=10)
    assert set(fit.ci.values()) == {None} and np.isnan(fit.predict_band(1e9, 1e10)[1])
    json.dumps(fit.to_dict(), allow_nan=False)


def test_seeds_of_one_cell_are_one_observation_and_can_be_resampled():
    rng = np.random.default_rng(8)
    n, d = grid()
    once = noisy(rng, law(n, d), 0.01)
    runs = make_runs(np.tile(n, 3), np.tile(d, 3), np.concatenate([once * 1.001, once, once / 1.001]))
    fit = fit_surface(runs, delta=1.0)
    alone = fit_surface(make_runs(n, d, once), delta=1.0)
    assert (fit.n, fit.cells) == (90, 30)
    assert fit.ci["alpha"] == pytest.approx(alone.ci["alpha"], rel=1e-2)
    seeds = fit_surface(runs, delta=1.0, bootstrap=50, resample="seeds")
    cells = fit_surface(runs, delta=1.0, bootstrap=50)
    assert np.ptp(seeds.ci["alpha"]) < 0.3 * np.ptp(cells.ci["alpha"])
    with pytest.raises(UserError, match="more than one seed"):
        fit_surface(make_runs(n, d, once), bootstrap=9, resample="seeds")


def test_points_of_a_training_curve_are_resampled_together():
    """Curves that move up and down as wholes: by points the interval is far too narrow."""
    rng = np.random.default_rng(1)
    n, d = np.repeat(np.geomspace(1e7, 5e9, 12), 12), np.tile(np.geomspace(1e9, 1e11, 12), 12)
    loss = law(n, d) * np.exp(np.repeat(0.01 * rng.standard_normal(12), 12))
    points = fit_surface(make_runs(n, d, loss), delta=0.02, bootstrap=100)
    curves = fit_surface(make_runs(n, d, loss, run=tuple(f"{v:g}" for v in n)), delta=0.02, bootstrap=100)
    assert curves.params == points.params
    assert np.ptp(curves.ci["alpha"]) > 1.5 * np.ptp(points.ci["alpha"])
    few = make_runs(n, d, loss, run=tuple(f"{i % 4}" for i in range(144)))
    with pytest.raises(UserError, match="belong to 4 runs, too few to resample"):
        fit_surface(few, bootstrap=9)


def test_groups_join_rows_by_cell_and_by_run():
    from qies.scaling.laws.intervals import independent_groups

    cell = np.array([0, 0, 1, 2, 3, 4])
    assert independent_groups(cell, ("",) * 6).tolist() == [0, 0, 1, 2, 3, 4]
    # the second seed of cell 0 is a point of the curve that also holds cell 2
    assert independent_groups(cell, ("a", "b", "", "b", "c", "c")).tolist() == [0, 0, 1, 0, 2, 2]


def test_one_size_is_refused():
    d = np.geomspace(1e9, 1e11, 12)
    with pytest.raises(UserError, match=r"more than one size.*--axis tokens"):
        fit_surface(make_runs(np.full(12, 1e8), d, law(1e8, d)))


@pytest.mark.parametrize("seed", [6, 24])
def test_a_term_that_only_the_smallest_runs_feel_is_found(seed):
    """An exponent near 6 whose amplitude at the centre of the data is e^-30, where tokens follow size."""
    rng = np.random.default_rng(seed)
    n = 10 ** rng.uniform(6, 11, 31)
    d = n * 10 ** rng.uniform(1, 1.6, 31)
    loss = noisy(rng, law(n, d, {"E": 0.67, "A": 64.2, "B": 179.0, "alpha": 0.407, "beta": 0.757}), 0.1)
    fit = fit_surface(make_runs(n, d, loss), delta=1e-3)
    x, _ = centred(n, d)
    form = surface_form("approach3")
    low, high = form.bounds(loss)
    starts = np.random.default_rng(1).uniform(np.maximum(low, -6), np.minimum(high, 3), (400, 5))
    found = minimise(form, starts, x, loss, np.ones((1, 31)), 1e-3, "log")[1]
    assert fit.params["alpha"] > 4 and fit.objective <= found.min() * (1 + 1e-6)


def test_bootstrap_is_repeatable_and_agrees_with_t():
    rng = np.random.default_rng(9)
    n, d = grid(8, 8)
    runs = make_runs(n, d, noisy(rng, law(n, d), 0.005))
    done = []
    fit = fit_surface(runs, delta=0.02, bootstrap=200, seed=4, progress=done.append)
    assert fit.draws.shape == (200, 5) and done[-1] == 200
    assert fit.to_dict() == fit_surface(runs, delta=0.02, bootstrap=200, seed=4).to_dict()
    t = fit_surface(runs, delta=0.02)
    for name in ("E", "alpha", "beta", "a", "b"):
        assert np.ptp(fit.ci[name]) == pytest.approx(np.ptp(t.ci[name]), rel=0.5)
    mean, lo, hi = fit.predict_band(n, d)
    assert (lo <= mean).all() and (mean <= hi).all()
    assert fit.ci["b"] == pytest.approx([1 - v for v in fit.ci["a"][::-1]])


def leverage(scatter):
    """60 runs at 20 to 100 tokens a parameter with noise of 0.2 %, and 8 of few tokens with noise of `scatter`."""
    rng = np.random.default_rng(3)
    n = np.append(np.geomspace(3e7, 1e9, 60), np.geomspace(1e9, 6e9, 8))
    d = np.append(n[:60] * np.geomspace(20, 100, 60)[rng.permutation(60)], np.geomspace(2e9, 1e9, 8))
    noise = np.append(np.full(60, 0.002), np.full(8, scatter)) * rng.standard_normal(68)
    return make_runs(n, d, law(n, d) * np.exp(noise))


def test_students_t_gives_way_to_the_bootstrap_where_points_of_leverage_are_outliers():
    runs = leverage(0.08)
    t = fit_surface(runs)
    fit = fit_surface(runs, bootstrap=None)
    assert (t.interval, fit.interval) == ("t", "bootstrap of runs") and fit.params == t.params
    assert np.ptp(fit.ci["a"]) > 1.5 * np.ptp(t.ci["a"]) and fit.ci == fit_surface(runs, bootstrap=200).ci
    assert "Student's t is too narrow here" in fit.warnings[0] and f"a: t {t.ci['a'][0]:.3g} to" in fit.warnings[0]
    even = fit_surface(leverage(0.002), bootstrap=None)
    assert even.interval == "t" and even.ci == fit_surface(leverage(0.002)).ci and not even.draws.size


def test_dictionary_is_json_and_the_summary_one_paragraph():
    rng = np.random.default_rng(10)
    n, d = grid()
    fit = fit_surface(make_runs(n, d, noisy(rng, law(n, d), 0.01)), drop_worst=1)
    stored = json.loads(json.dumps(fit.to_dict(), allow_nan=False))
    assert stored["params"] == fit.params and stored["dropped"][0]["name"] == fit.dropped[0].name
    assert set(stored["ci"]) == {"E", "A", "B", "alpha", "beta", "a", "b"} and len(stored["residuals"]) == 29
    assert "\n" not in fit.summary() and "FLOPs 6ND" in fit.summary()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"form": "aproach3"}, "Did you mean 'approach3'"),
        ({"resample": "sees"}, "Did you mean 'seeds'"),
        ({"criterion": "lss"}, "Did you mean 'loss'"),
        ({"delta": 0.0}, "delta > 0"),
        ({"bootstrap": 1}, "at least 2"),
        ({"drop_worst": 27}, "found 30 less 27 dropped"),
    ],
)
def test_bad_options_are_refused(options, says):
    n, d = grid()
    with pytest.raises(UserError, match=says):
        fit_surface(make_runs(n, d, law(n, d)), **options)


def test_unsound_runs_are_refused():
    n, d = grid()
    loss = law(n, d)
    loss[0] = np.nan
    with pytest.raises(UserError, match="finite and positive"):
        fit_surface(make_runs(n, d, loss))


def test_gemstones_as_published():
    columns = {"params": "params_active_precise", "loss": "final_loss"}
    fit = fit_surface(read_runs(published("gemstones_hot.jsonl"), columns), delta=1e-3)
    assert fit.n == 220
    assert round(fit.objective, 8) == 0.00198161
    assert np.log(fit.params["A"]) == pytest.approx(5.361, abs=2e-3)
    assert np.log(fit.params["B"]) == pytest.approx(15.416, abs=5e-3)
    assert np.log(fit.params["E"]) == pytest.approx(0.7623, abs=1e-4)
    assert fit.params["alpha"] == pytest.approx(0.2929, abs=1e-4)
    assert fit.params["beta"] == pytest.approx(0.7129, abs=2e-4)


@pytest.mark.parametrize(
    ("arm", "errors"),
    [("rpj", {(1.4, 640): 0.0071, (6.9, 20): 0.0073}), ("c4_original", {(6.9, 20): -0.043})],
)
def test_gadre_extrapolates_as_published(arm, errors):
    columns = {"params": "N", "tokens": "D", "loss": "loss_c4_val", "arm": "train_set"}
    runs = read_runs(published("gadre_104_runs.csv"), columns).of_arm(arm)
    multiplier, sizes = np.round(runs.tokens / runs.params), np.unique(runs.params)
    small = ((multiplier == 20) & (runs.params <= sizes[3])) | ((multiplier == 320) & (runs.params == sizes[0]))
    fit = fit_surface(runs.select(small), "gadre")
    assert fit.n == 5
    for (billions, m), error in errors.items():
        [i] = np.flatnonzero((np.round(runs.params / 1e9, 1) == billions) & (multiplier == m))
        assert fit.predict(runs.params[i], runs.tokens[i]) / runs.loss[i] - 1 == pytest.approx(error, abs=2e-4)


def coverage(datasets, bootstrap, delta, scatter=0.01, shape=(6, 6)):
    rng = np.random.default_rng(12)
    n, d = grid(*shape)
    truth = {**CHINCHILLA, "a": 0.366 / 0.714, "b": 0.348 / 0.714}
    held = dict.fromkeys([*truth, "curve"], 0)
    for i in range(datasets):
        fit = fit_surface(make_runs(n, d, noisy(rng, law(n, d), scatter)), delta=delta, bootstrap=bootstrap, seed=i)
        for name, value in truth.items():
            held[name] += fit.ci[name][0] <= value <= fit.ci[name][1]
        _, lo, hi = fit.predict_band(1e10, 2e11)
        held["curve"] += lo <= law(1e10, 2e11) <= hi
    return {name: count / datasets for name, count in held.items()}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("delta", [1e-3, 0.02])
@pytest.mark.parametrize("bootstrap", [0, 400])
def test_intervals_cover_as_stated(bootstrap, delta):
    """200 tables have a binomial standard error of 1.5 % at 95 %: the bounds are 3.2 below and 2 above."""
    found = coverage(200, bootstrap, delta)
    print(f"held {found} (bootstrap {bootstrap}, delta {delta})")
    assert all(0.90 <= rate <= 0.98 for rate in found.values()), found


def test_240_points_and_400_bootstraps_are_quick():
    import time

    rng = np.random.default_rng(13)
    n, d = grid(16, 15)
    runs = make_runs(n, d, noisy(rng, law(n, d), 0.01))
    began = time.perf_counter()
    fit_surface(runs, delta=1e-3, bootstrap=400)
    assert time.perf_counter() - began < 20
