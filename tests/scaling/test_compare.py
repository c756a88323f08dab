"""Comparisons whose answer is known, the null, and input that must be refused or reported."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from two_arms import E, chinchilla, grid, ladder, noisy, runs_of, table

from qies.cli import main
from qies.errors import UserError
from qies.scaling import compare, figures, read_runs

GRID, LADDER = grid(), ladder()
QUICK = Path(__file__).parents[2] / "results" / "reference" / "small"


def flat(law):
    return {arm: values[:, None] for arm, values in law.items()}


def gains(result, variable):
    return [point.gain for point in result.gain[variable]]


def null(cells, count, seed, seeds=1, **noise):
    """(share of "no difference", coverage of a gain of 1 at the largest compute) over simulated nulls."""
    rng = np.random.default_rng(seed)
    base = chinchilla(*cells.T)
    results = [
        compare(table(cells, noisy(rng, {"q": base, "t": base}, seeds, **noise), seeds), "q", "t", points=2)
        for _ in range(count)
    ]
    return (
        np.mean([r.verdict == "no difference" for r in results]),
        np.mean([r.at_largest.lo <= 1 and (r.at_largest.hi or np.inf) >= 1 for r in results]),
    )


@pytest.mark.parametrize("cells", [GRID, LADDER], ids=["surface", "power"])
def test_half_the_compute_for_the_same_loss_is_a_gain_of_two_everywhere(cells):
    n, d = cells.T
    base = np.exp(4 - 0.05 * np.log(n * d)) if cells is LADDER else chinchilla(n, d)
    runs = table(cells, flat({"q": base, "t": base}), flops={"q": 3 * n * d, "t": 6 * n * d})
    result = compare(runs, "q", "t")
    assert gains(result, "compute") == pytest.approx([2] * 13, rel=1e-5)
    assert gains(result, "params") == pytest.approx([1] * 13, rel=1e-5)
    assert gains(result, "data") == pytest.approx([1] * 13, rel=1e-5)
    assert result.verdict == "q wins" and compare(runs, "t", "q").verdict == "q wins"
    assert compare(runs, "t", "q").at_largest.gain == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize(("variable", "n_times", "d_times"), [("params", 2, 1), ("data", 1, 3)])
def test_multiplier_of_parameters_or_data(variable, n_times, d_times):
    n, d = GRID.T
    result = compare(table(GRID, flat({"q": chinchilla(n_times * n, d_times * d), "t": chinchilla(n, d)})), "q", "t")
    assert gains(result, variable) == pytest.approx([n_times * d_times] * 13, rel=1e-4)
    assert gains(result, "compute") == pytest.approx([n_times * d_times] * 13, rel=1e-4)
    assert result.gain[variable][-1].reach == pytest.approx(n_times * d_times, rel=1e-4)  # read beyond the baseline's


@pytest.mark.parametrize("cells", [GRID, LADDER], ids=["surface", "power"])
def test_gain_in_time_is_apart_from_that_in_compute(cells):
    n, d = cells.T
    loss = 30 * (n * d) ** -0.06 if cells is LADDER else chinchilla(n, d)
    seconds = {"q": 3e-9 * n * d, "t": 1e-9 * n * d}
    result = compare(table(cells, flat({"q": loss, "t": loss}), seconds=seconds), "q", "t")
    assert gains(result, "time") == pytest.approx([1 / 3] * 13, rel=1e-5)
    assert gains(result, "compute") == pytest.approx([1] * 13, rel=1e-5)
    assert "time" not in compare(table(cells, flat({"q": loss, "t": loss})), "q", "t").gain


def test_crossing_of_two_power_laws_by_hand():
    c = 6 * LADDER.prod(axis=1)
    # 40 C^-0.06 = 20 C^-0.04 at C = 2^50 = 1.126e15
    result = compare(table(LADDER, flat({"q": 40 * c**-0.06, "t": 20 * c**-0.04})), "q", "t")
    (crossing,) = result.crossings
    assert crossing.compute == pytest.approx(2.0**50, rel=1e-6)
    assert crossing.lower_beyond == "q" and crossing.reach == 1.0
    assert result.gain["compute"][0].gain < 1 < result.at_largest.gain


def test_crossing_beyond_the_runs_says_how_far():
    c = 6 * LADDER.prod(axis=1)
    at = 10 * c.max()
    result = compare(table(LADDER, flat({"q": 20 * (c / at) ** -0.06, "t": 20 * (c / at) ** -0.04})), "q", "t")
    assert result.verdict == "t wins"
    assert result.crossings[0].reach == pytest.approx(10, rel=1e-6)
    assert "10 times beyond the runs" in result.summary()


@pytest.mark.parametrize(
    ("lo", "hi", "said"),
    [
        (1e9, 1e11, "not significantly different from 1e+09 to 1e+11"),
        (None, 1e11, "not significantly different to 1e+11"),
        (1e9, None, "not significantly different from 1e+09"),
        (None, None, "not significantly different at any compute"),
    ],
)
def test_what_is_open_of_a_crossings_range_is_left_out(lo, hi, said):
    c = 6 * LADDER.prod(axis=1)
    result = compare(table(LADDER, flat({"q": 40 * c**-0.06, "t": 20 * c**-0.04})), "q", "t")
    crossing = dataclasses.replace(result.crossings[0], lo=lo, hi=hi)
    assert f"({said})" in dataclasses.replace(result, crossings=(crossing,)).summary()


def test_frontier_of_a_surface_is_its_optimum():
    n, d = GRID.T
    result = compare(table(GRID, flat({"q": chinchilla(n, d), "t": chinchilla(n, d, e=E + 0.1)})), "q", "t")
    point = result.frontier["q"][5]
    assert 6 * point.params * point.tokens == pytest.approx(point.compute)
    assert point.loss == pytest.approx(chinchilla(point.params, point.tokens), rel=1e-6)
    tilted = chinchilla(point.params * np.array([0.8, 1.25]), point.tokens / np.array([0.8, 1.25]))
    assert (tilted > point.loss).all()


def test_both_directions_are_found_with_noise():
    rng = np.random.default_rng(0)
    for cells, seeds in ((GRID, 2), (LADDER, 3)):
        n, d = cells.T
        losses = noisy(rng, {"q": chinchilla(1.6 * n, 1.6 * d), "t": chinchilla(n, d)}, seeds, 0.002, 0.003)
        runs = table(cells, losses, seeds)
        there, back = compare(runs, "q", "t"), compare(runs, "t", "q")
        assert there.verdict == back.verdict == "q wins"
        assert there.at_largest.lo > 1 > back.at_largest.hi
        assert there.paired[-1].p < 0.05 and there.paired[-1].difference == -back.paired[-1].difference


@pytest.mark.slow
def test_gain_is_inside_its_band_when_there_is_one(quick_fits):
    rng = np.random.default_rng(5)
    n, d = GRID.T
    law = {"q": chinchilla(n, d), "t": chinchilla(n, d)}
    flops = {"q": 6 * n * d / 1.5, "t": 6 * n * d}
    inside = []
    for _ in range(10):
        end = compare(table(GRID, noisy(rng, law, 1, 0.003), flops=flops), "q", "t", points=2).at_largest
        inside.append(end.lo <= 1.5 <= end.hi)
    assert np.mean(inside) >= 0.8


@pytest.mark.slow
def test_no_difference_under_the_null_quickly(quick_fits):
    for cells, count in ((GRID, 12), (LADDER, 50)):
        silent, covered = null(cells, count, 1, seed_sd=0.003, shared_sd=0.003)
        assert silent >= 0.88 and covered >= 0.88


def test_a_candidate_below_the_baselines_floor_wins_and_above_its_every_loss_loses():
    rng = np.random.default_rng(0)
    n, d = GRID.T
    runs = table(GRID, noisy(rng, {"q": chinchilla(n, d) - E + 0.1, "t": chinchilla(n, d)}, 1, 0.003))
    end = compare(runs, "q", "t").at_largest
    assert end.gain is None and end.lo > 1 and end.hi is None
    assert compare(runs, "q", "t").verdict == compare(runs, "t", "q").verdict == "q wins"
    c = 6 * LADDER.prod(axis=1)
    worse = table(LADDER, noisy(rng, {"q": np.full(4, 9.0), "t": 30 * c**-0.06}, 1, 0.003))
    end = compare(worse, "q", "t").at_largest
    assert end.gain is None and end.lo == 0 and end.hi < 1 and "out of the baseline's reach" in end.words()
    json.dumps(compare(worse, "q", "t").to_dict(), allow_nan=False)
    assert compare(worse, "q", "t").verdict == "t wins"


def test_arms_of_one_flat_loss_have_a_gain_of_one():
    result = compare(table(LADDER, flat({"q": np.full(4, 3.0), "t": np.full(4, 3.0)})), "q", "t")
    assert result.verdict == "no difference" and gains(result, "compute") == [1.0] * 13


def test_times_that_are_known_for_some_runs_alone_are_said():
    seconds = {"q": np.where(np.arange(20) < 5, np.nan, 1.0), "t": np.where(np.arange(20) == 3, 0.0, 1.0)}
    law = {"q": chinchilla(*GRID.T), "t": chinchilla(*GRID.T)}
    result = compare(table(GRID, flat(law), seconds=seconds), "q", "t")
    assert "time" not in result.gain
    assert "no gain in time: 6 of 40 (size, tokens) points lack a positive value of it" in result.warnings


def test_power_analysis_answers_where_nothing_is_shown():
    rng = np.random.default_rng(3)
    n, d = LADDER.T
    losses = noisy(rng, {"q": chinchilla(1.02 * n, d), "t": chinchilla(n, d)}, 3, seed_sd=0.004)
    result = compare(table(LADDER, losses, 3), "q", "t")
    assert result.verdict == "no difference"
    assert result.power.detectable > 1 and (result.power.cells_needed or 1001) > result.power.cells
    assert all(size.have == 3 and size.measured for size in result.power.sizes)
    assert "Fewest seeds are needed at N = " in result.summary()


def test_identical_arms_have_a_gain_of_one_and_no_winner():
    rng = np.random.default_rng(0)
    for cells in (GRID, LADDER):
        losses = noisy(rng, {"q": chinchilla(*cells.T)}, 1, 0.003)
        result = compare(table(cells, {"q": losses["q"], "t": losses["q"]}), "q", "t")
        assert result.verdict == "no difference" and result.crossings == ()
        assert gains(result, "compute") == pytest.approx([1] * 13, abs=1e-6)


@pytest.mark.parametrize("noise", [0.001, 0.05, 0.3])
def test_identical_arms_that_scatter_far_from_any_law_are_no_difference_either(noise):
    rng, cells = np.random.default_rng(1), LADDER[:3]
    for _ in range(10):
        losses = noisy(rng, {"q": chinchilla(*cells.T)}, 1, noise)
        result = compare(table(cells, {"q": losses["q"], "t": losses["q"]}), "q", "t", form="power")
        assert result.verdict == "no difference" and result.shared_fit.p > 0.99


def test_one_seed_is_said_to_show_nothing():
    result = compare(table(LADDER, flat({"q": chinchilla(*LADDER.T), "t": chinchilla(*LADDER.T)})), "q", "t")
    assert any("one seed does not measure" in w for w in result.warnings)
    assert all(row.p is None for row in result.paired)


def test_one_budget_a_size_falls_back_to_power_laws_and_says_so():
    law = {"q": chinchilla(*LADDER.T), "t": chinchilla(*LADDER.T)}
    result = compare(table(LADDER, flat(law)), "q", "t")
    assert result.form == "power" and "no surface L(N, D) is identified" in result.summary()
    with pytest.raises(UserError, match="form 'surface' needs"):
        compare(table(LADDER, flat(law)), "q", "t", form="surface")


def test_unequal_designs_and_missing_seeds():
    rng = np.random.default_rng(1)
    n, d = GRID.T
    runs = table(GRID, noisy(rng, {"q": chinchilla(n, d), "t": chinchilla(n, d)}, 3, 0.003), 3)
    gone = np.array(
        [
            (a == "q" and p > 2e7) or (s == 2 and p < 2e6)
            for a, p, s in zip(runs.arm, runs.params, runs.seed, strict=True)
        ]
    )
    result = compare(runs.select(~gone), "q", "t")
    assert result.cells == {"q": 15, "t": 20} and len(result.paired) == 15
    assert {row.n for row in result.paired} == {2, 3}
    assert any("5 of t (size, tokens) points have no match" in w for w in result.warnings)
    assert result.gain["params"][-1].x == pytest.approx(1e7)  # the largest size both arms have


def test_two_sizes_rest_on_seeds_and_one_on_the_paired_test():
    rng = np.random.default_rng(2)
    n, d = LADDER.T
    losses = noisy(rng, {"q": chinchilla(2 * n, d), "t": chinchilla(n, d)}, 4, 0.001)
    runs = table(LADDER, losses, 4)
    two = compare(runs.select(runs.params > 5e6), "q", "t")
    assert two.at_largest.lo > 1 and two.verdict == "q wins" and two.shared_fit.p is None
    assert any("noise of seeds alone" in w for w in two.warnings)
    one = compare(runs.select(runs.params > 2e7), "q", "t")
    assert one.at_largest is None and one.gain == {} and one.verdict == "q wins"
    assert "paired test at the largest matched size" in one.reason
    lone = compare(runs.select((runs.params > 5e6) & (runs.seed == 0)), "q", "t")
    assert lone.verdict == "no difference" and lone.at_largest.lo is None
    json.dumps(lone.to_dict(), allow_nan=False)


def test_a_paired_test_that_says_the_opposite_stops_the_verdict():
    rng = np.random.default_rng(0)
    sizes = np.geomspace(1e5, 1e8, 12)
    cells = ladder(sizes)
    base = 30 * (6 * cells.prod(axis=1)) ** -0.06
    better = base * np.where(np.arange(12) == 11, 1.004, 0.97)  # lower everywhere but at the largest size
    result = compare(table(cells, noisy(rng, {"q": better, "t": base}, 4, 0.0005), 4), "q", "t")
    assert result.at_largest.lo > 1
    assert result.verdict == "no difference" and "says the opposite" in result.reason


def test_a_diverged_run_in_one_arm_is_left_out_and_named():
    n, d = GRID.T
    rng = np.random.default_rng(0)
    runs = table(GRID, noisy(rng, {"q": chinchilla(n, d), "t": chinchilla(n, d)}, 1, 0.003))
    loss = runs.loss.copy()
    loss[7], loss[30] = 9.5, np.nan
    result = compare(dataclasses.replace(runs, loss=loss), "q", "t")
    assert [run.index for run in result.dropped] == [7, 30] and [run.name for run in result.dropped] == [
        "run 7",
        "run 30",
    ]
    assert result.verdict == "no difference" and "2 runs left out" in result.summary()


def test_ranges_that_do_not_overlap_give_no_gain():
    small, large = ladder(np.geomspace(1e4, 1e5, 4)), ladder(np.geomspace(1e7, 1e8, 4))
    rows = [
        (n, d, 6 * n * d, chinchilla(n, d), arm, 0, np.nan) for arm, c in (("q", small), ("t", large)) for n, d in c
    ]
    result = compare(runs_of(*zip(*rows, strict=True)), "q", "t")
    assert result.verdict == "no difference" and "do not overlap" in result.summary()


@pytest.mark.parametrize(
    ("arms", "options", "message"),
    [
        (("qq", "transformer"), {}, "Unknown arm 'qq' in these runs. Known: "),
        (("qies", "transfomer"), {}, "Did you mean 'transformer'"),
        (("qies", "qies"), {}, "both arms are 'qies'"),
        (("qies", "transformer"), {"form": "surfase"}, "Did you mean 'surface'"),
        (("qies", "transformer"), {"level": 1.0}, "0 < level < 1"),
    ],
)
def test_bad_input_is_one_line(arms, options, message):
    with pytest.raises(UserError, match=message):
        compare(read_runs(QUICK / "runs"), *arms, **options)


def test_an_arm_without_a_sound_run_is_refused():
    runs = table(LADDER, flat({"q": chinchilla(*LADDER.T), "t": np.full(4, np.nan)}))
    with pytest.raises(UserError, match="arm 't' has no sound run left"):
        compare(runs, "q", "t")


def test_the_verb_writes_the_result_and_prints_the_summary(tmp_path, capsys):
    out = tmp_path / "out.json"
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(QUICK), "--arms", "qies", "transformer", "--json", str(out)])
    assert stop.value.code == 0
    value = json.loads(out.read_text())
    assert value["summary"] == capsys.readouterr().out.strip()
    assert value["gain"]["at_largest"] == value["gain"]["compute"][-1]
    assert {"compute", "gain", "lo", "hi"} <= set(value["gain"]["at_largest"])
    assert set(value["gain"]) == {"compute", "params", "data", "time", "at_largest", "curves"}
    for variable in ("params", "data", "time"):
        at = value["gain"][variable]
        assert {"compute", "gain", "lo", "hi"} <= set(at)
        assert at["gain"] == value["gain"]["curves"][variable][-1]["gain"]
    assert value["gain"]["curves"]["compute"] == value["gain"]["compute"]
    assert value["verdict"] in ("qies wins", "transformer wins", "no difference")
    assert {"statistic", "p"} <= set(value["shared_fit"]) and len(value["paired"]) == 3
    assert value["flops_convention"].startswith("matrix products only")


def test_the_verb_refuses_bad_columns(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(QUICK), "--arms", "qies", "transformer", "--columns", "params"])
    assert stop.value.code == 2 and "needs OURS=THEIRS" in capsys.readouterr().err


def test_every_figure_is_drawn():
    result = compare(read_runs(QUICK), "qies", "transformer")
    shown = result.figures()
    assert set(shown) == {"gain-compute", "gain-params", "gain-data", "gain-time", "frontier", "paired"}
    for figure in shown.values():
        assert figure.svg().startswith("<svg")
    with pytest.raises(UserError, match=r"Unknown gain 'compite'\. Did you mean 'compute'"):
        figures.gain_figure(result, "compite")


def test_the_regime_is_that_of_the_matched_runs_and_is_named():
    rng = np.random.default_rng(0)
    losses = noisy(rng, {"q": chinchilla(*LADDER.T), "t": chinchilla(*LADDER.T)}, 3, 0.003)
    result = compare(table(LADDER, losses, 3), "q", "t")
    ratio = pytest.approx([20.0, 20.0])
    assert result.to_dict()["regime"] == {
        "sizes": pytest.approx([1e6, 3e7]),
        "tokens_per_parameter": ratio,
        "context": [],
        "corpus": [],
        "seeds": 3,
        "sizes_count": 4,
    }
    assert "(4 sizes of 1e+06 to 3e+07 parameters, 20 tokens per parameter, 3 seeds)" in result.summary()


def test_the_regime_names_context_and_corpus_of_the_records():
    result = compare(read_runs(QUICK), "qies", "transformer")
    assert result.to_dict()["regime"]["context"] == [512] and result.to_dict()["regime"]["corpus"] == ["builtin"]
    assert "3 seeds, context of 512 tokens, corpus builtin)" in result.summary()


def test_runs_of_other_unique_tokens_are_no_further_seeds():
    rng, n = np.random.default_rng(0), np.repeat(LADDER[:, 0], 2)
    rows = np.stack([n, np.repeat(LADDER[:, 1], 2)], axis=1)
    runs = table(rows, noisy(rng, dict.fromkeys("qt", chinchilla(*rows.T)), 1, 0.003))
    runs = dataclasses.replace(runs, unique=runs.tokens / np.tile([1, 4], 8))
    result = compare(runs, "q", "t")
    assert result.cells == {"q": 8, "t": 8} and result.regime["seeds"] == 1
    assert any("8 runs repeat data" in w for w in result.warnings)


def test_three_sizes_pool_their_scatter_with_the_noise_of_seeds_and_say_so():
    rng, cells = np.random.default_rng(0), LADDER[:3]
    result = compare(table(cells, noisy(rng, dict.fromkeys("qt", chinchilla(*cells.T)), 3, 0.003), 3), "q", "t")
    assert any("three sizes: the intervals pool" in w for w in result.warnings)


def test_no_interval_is_narrower_than_seeds_make_it():
    """Two seeds of each size that differ by 1 % around means that lie on the laws."""
    base = 30 * (6 * LADDER.prod(axis=1)) ** -0.06
    swing = np.exp(0.005 * np.array([1, -1]))
    losses = {"q": base[:, None] * swing, "t": base[:, None] / swing}
    end = compare(table(LADDER, losses, 2), "q", "t").at_largest
    assert end.hi / end.lo > 1.2


def test_the_best_of_a_sweep_is_compared_on_request():
    rng = np.random.default_rng(0)
    base = 30 * (6 * LADDER.prod(axis=1)) ** -0.06
    swept = {arm: base[:, None] * np.exp(0.2 * rng.random((4, 6)) ** 2) for arm in "qt"}
    for values in swept.values():
        values[:, 3] = base
    runs = dataclasses.replace(table(LADDER, swept, 6), seed=np.zeros(48, np.int64))
    assert any("--best-per-cell" in w for w in compare(runs, "q", "t").warnings)
    best = compare(runs, "q", "t", best=True)
    assert best.runs == {"q": 4, "t": 4} and gains(best, "compute") == pytest.approx([1] * 13, abs=1e-6)
    assert not any("--best-per-cell" in w for w in best.warnings)
