"""Figures of made-up results: what they show is what the result says, from the result and from its JSON alike."""

import json
import math

import numpy as np
import pytest

from qies.cli import main
from qies.errors import UserError
from qies.plotting import Axis, Band, Line, Note, Points, style
from qies.scaling import figures, fit_power, fit_surface
from qies.scaling.tables.runs import Runs


def gain_points(key="compute", **changes):
    points = [
        {key: 10.0 ** (i + 10), "gain": 1.0 + 0.1 * i, "lo": 0.9 + 0.1 * i, "hi": 1.1 + 0.1 * i, "reach": 1.0}
        for i in range(4)
    ]
    points[-1].update(reach=1.5, **changes)
    return points


def pair(candidate="qies", baseline="transformer", **changes):
    def curve(shift):
        return [
            {"compute": 10.0**p, "loss": 5 - 0.2 * i + shift, "lo": 4.9 - 0.2 * i, "hi": 5.2 - 0.2 * i, "params": None,
             "tokens": None, "reach": 1.0 if p < 13 else 3.0}
            for i, p in enumerate((10, 11, 12, 13))
        ]  # fmt: skip

    row = {"params": 1e5, "tokens": 2e5, "difference": -0.02, "p": 0.01, "sd": 0.01, "n": 3, "test": "paired t"}
    return {
        "candidate": candidate, "baseline": baseline, "verdict": f"{candidate} wins", "reason": "so",
        "gain": {"curves": {"compute": gain_points(), "params": [], "data": gain_points("tokens"), "time": []}},
        "paired": [row | {"lo": -0.03, "hi": -0.01}, row | {"params": 2e5, "lo": None, "hi": None, "test": "one seed"}],
        "frontier": {candidate: curve(-0.1), baseline: curve(0.0)},
        "losses": {arm: [(1e10, 1e5, 2e5, 5.0), (1e12, 1e6, 2e6, 4.6)] for arm in (candidate, baseline)},
        "crossings": [{"compute": 1e11, "lo": 5e10, "hi": None, "lower_beyond": candidate, "reach": 1.0}],
        **changes,
    }  # fmt: skip


def marks(figure, kind, name=None):
    return [m for m in figure.panels[0].marks if isinstance(m, kind) and (name is None or m.name == name)]


def surface_runs(noise=0.0):
    n, d = (g.reshape(-1) for g in np.meshgrid(np.geomspace(1e7, 1e9, 4), np.geomspace(2e8, 2e10, 4)))
    loss = (1.7 + 400 * n**-0.34 + 1800 * d**-0.37) * np.exp(noise * np.random.default_rng(0).standard_normal(16))
    one = np.ones(16)
    words = tuple(f"run {i}" for i in range(16))
    return Runs(
        n,
        d,
        6 * n * d,
        loss,
        ("a",) * 16,
        one.astype(np.int64),
        one,
        np.nan * one,
        ("",) * 16,
        words,
        ("",) * 16,
        "6ND",
    )


@pytest.fixture(scope="module")
def fitted():
    runs = surface_runs(0.003)
    return fit_surface(runs, bootstrap=20), runs


def test_gain_curve_shows_the_band_the_line_at_one_and_what_is_extrapolated():
    shown = figures.gain_figure(pair())
    [band] = marks(shown, Band)
    assert list(band.lo) == pytest.approx([0.9, 1.0, 1.1, 1.2]) and list(band.hi) == pytest.approx([1.1, 1.2, 1.3, 1.4])
    [one] = marks(shown, Line, "no gain")
    assert one.y == [1.0, 1.0] and one.x == [1e10, 1e13]
    [solid] = marks(shown, Line, "qies over transformer")
    assert list(solid.y)[:3] == pytest.approx([1.0, 1.1, 1.2]) and list(solid.y)[3] is None
    [faint] = [m for m in marks(shown, Line) if m.faint]
    assert list(faint.y) == pytest.approx([1.0, 1.1, 1.2, 1.3])
    assert "FLOPs" in shown.panels[0].x.title and shown.panels[0].y.log


def test_an_unbounded_gain_leaves_the_curve_readable():
    shown = figures.gain_figure(pair(gain={"curves": {"compute": gain_points(hi=None, lo=1e-9)}}))
    _, y = shown.panels[0].scales(6)
    assert y.low > 0.3 and y.high < 4
    [band] = marks(shown, Band)
    assert band.segments(y.low, y.high)[0][2][-1] == y.high and band.segments(y.low, y.high)[0][1][-1] == y.low
    unknown = figures.gain_figure(pair(gain={"curves": {"compute": gain_points(gain=None, lo=None, hi=None)}}))
    [band] = marks(unknown, Band)
    assert len(band.segments(0.1, 10)[0][0]) == 3
    json.dumps(unknown.plotly(), allow_nan=False)


def test_other_gains_have_their_axes_and_unknown_ones_are_refused():
    assert "tokens" in figures.gain_figure(pair(), "data").panels[0].x.title
    with pytest.raises(UserError, match="no gain in time"):
        figures.gain_figure(pair(), "time")
    with pytest.raises(UserError, match="Known: compute"):
        figures.gain_figure(pair(), "flops")


def test_several_pairs_stand_in_one_figure_with_styles_of_their_own():
    shown = figures.gain_figure([pair(), pair("no_phase"), pair("qies", "no_phase")])
    names = [name for name in shown.legend() if name != "no gain"]
    assert names == ["qies over transformer", "no_phase over transformer", "qies over no_phase"]
    looks = [shown.legend()[name].style for name in names]
    assert len({look.colour for look in looks}) == len({look.dash for look in looks}) == 3
    assert looks[0] == style(1)  # the arm's own


def test_arms_of_any_name_keep_their_style_in_every_figure_and_lines_of_no_arm_have_their_own():
    one = pair("mine", "theirs")
    [points, *_] = [m for m in marks(figures.frontier_figure(one), Points) if m.name == "mine"]
    for shown in (figures.gain_figure(one), figures.paired_figure(one)):
        (_, arm), (_, reference) = sorted(shown.legend().items(), key=lambda item: item[0].startswith("no "))
        assert arm.style == points.style and reference.style not in {style(i) for i in range(7)}


def test_frontier_shows_each_arm_once_and_names_the_crossing_of_a_single_pair():
    shown = figures.frontier_figure([pair(), pair("no_phase")])
    assert [m.name for m in marks(shown, Points)] == ["transformer", "qies", "no_phase"]
    assert len(marks(shown, Band)) == 3 and not marks(shown, Note)
    assert marks(shown, Points)[0].x == [1e10, 1e12] and marks(shown, Points)[0].y == [5.0, 4.6]
    [crossing] = marks(figures.frontier_figure(pair()), Note)
    assert (crossing.x, crossing.y) == (1e11, pytest.approx(4.8))
    outside = pair(crossings=[{"compute": 1e20, "lo": None, "hi": None, "lower_beyond": "x", "reach": 1e7}])
    assert not marks(figures.frontier_figure(outside), Note)


def test_paired_differences_carry_their_intervals_and_one_seed_none():
    [points] = marks(figures.paired_figure(pair()), Points)
    assert points.y == [-0.02, -0.02] and points.lo == [-0.03, None] and points.hi == [-0.01, None]
    data = figures.paired_figure(pair()).plotly()["data"]
    [trace] = [t for t in data if "error_y" in t]
    assert trace["error_y"]["array"] == [pytest.approx(0.01), None]
    with pytest.raises(UserError, match="nothing is paired"):
        figures.paired_figure(pair(paired=[]))
    two = marks(figures.paired_figure([pair(), pair("no_phase")]), Points)
    assert two[0].x[0] < 1e5 < two[1].x[0]  # side by side


@pytest.mark.parametrize("axis", ["params", "tokens", "flops"])
def test_surface_is_drawn_through_its_runs(axis):
    runs = surface_runs()
    fit = fit_surface(runs)
    shown = figures.surface_figure(fit, runs, axis)
    every = sorted(y for m in marks(shown, Points) for y in m.y)
    assert every == pytest.approx(sorted(runs.loss))
    if axis != "flops":  # a law without noise meets every run of its level
        for points in marks(shown, Points):
            [line] = [m for m in marks(shown, Line, points.name) if not m.faint]
            law = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None]
            found = np.exp(np.interp(np.log(points.x), *np.log(np.array(law)).T))
            assert found[1:-1] == pytest.approx(points.y[1:-1], rel=2e-3)
    else:
        [line] = [m for m in marks(shown, Line) if m.faint]
        assert list(line.y) == pytest.approx(list(fit.frontier(line.x)), rel=1e-9)
        below = np.interp(np.log(runs.flops), np.log(line.x), line.y)
        assert (below <= runs.loss + 1e-3).all()


def test_a_stored_surface_draws_the_same_law_without_its_band(fitted):
    fit, runs = fitted
    stored = json.loads(json.dumps(fit.to_dict()))
    whole, plain = figures.surface_figure(fit, runs, "flops"), figures.surface_figure(stored, axis="flops")
    assert len(marks(whole, Band)) == 1 and not marks(plain, Band)
    for a, b in zip(marks(whole, Line), marks(plain, Line), strict=True):
        assert [v for v in a.y if v is not None] == pytest.approx([v for v in b.y if v is not None])
    with pytest.raises(UserError, match=r"Unknown axis 'size'\. Known: params"):
        figures.surface_figure(fit, runs, "size")


def test_residuals_are_in_percent_and_outliers_named():
    rows = [
        {"name": f"run {i}", "loss": 3.0 * math.exp(r), "predicted": 3.0 + 0.1 * i, "residual": r, "outlier": r > 0.1}
        for i, r in enumerate((0.0, 0.01, -0.02, 0.2))
    ]
    shown = figures.residual_figure({"form": "approach3", "residuals": rows})
    [points] = marks(shown, Points)
    assert points.y == pytest.approx([0, 1.005, -1.980, 22.14], abs=0.01)
    [note] = marks(shown, Note)
    assert note.text == "run 3" and note.y == pytest.approx(22.14, abs=0.01)
    with pytest.raises(UserError, match="no residual"):
        figures.residual_figure({"form": "approach3", "residuals": []})


def test_outliers_of_one_name_are_named_once_where_the_furthest_is():
    rows = [
        {"name": name, "loss": 3.0, "predicted": 3.0 + i / 10, "residual": r, "outlier": True}
        for i, (name, r) in enumerate((("a", 0.1), ("b", -0.2), ("a", 0.3)))
    ]
    shown = marks(figures.residual_figure({"form": "gadre", "residuals": rows}), Note)
    assert [(note.text, round(note.x, 1)) for note in shown] == [("a", 3.2), ("b", 3.1)]


def test_levels_of_a_wide_grid_are_spread_over_it():
    level = np.repeat(np.arange(1.0, 12.0), 10)
    assert figures._spread(level) == [1, 3, 5, 7, 9, 11]
    assert figures._spread(np.append(level, 99.0)) == [1, 3, 5, 7, 9, 11]  # a lone run takes no curve
    assert figures._spread(np.array([2.0, 1.0])) == [1, 2]


def test_bootstrap_shows_every_pair_of_parameters(fitted):
    fit, _ = fitted
    shown = figures.bootstrap_figure(fit)
    assert len(shown.panels) == 10 and shown.columns == 3
    cloud, best = shown.panels[0].marks
    assert len(cloud.x) == 20 and cloud.faint
    assert (best.x[0], best.y[0]) == (fit.params["E"], fit.params["A"])
    assert cloud.x == pytest.approx(fit.draws[:, 0].tolist())
    with pytest.raises(UserError, match="--bootstrap"):
        figures.bootstrap_figure(fit.to_dict() | {"draws": []})


def test_power_law_plots_itself_and_its_bootstrap():
    x = np.geomspace(1e5, 1e8, 24)
    loss = 20 * x**-0.1 * np.exp(0.002 * np.random.default_rng(1).standard_normal(24))
    law = fit_power(x, loss)
    shown = law.figures(x, loss, "parameters N")["law"]
    assert shown.panels[0].x == Axis("parameters N", log=True)
    assert len(marks(shown, Band)) == 1 and marks(shown, Points)[0].x == x.tolist()
    assert law.draws.shape == (400, 2)
    assert np.median(law.draws, axis=0) == pytest.approx(list(law.params.values()), rel=0.01)
    stored = json.loads(json.dumps(law.to_dict()))
    assert figures.power_figure(stored, x, loss, "parameters N").svg() == shown.svg()
    assert figures.bootstrap_figure(stored).svg() == figures.bootstrap_figure(law).svg()
    few = fit_power(x[:4], loss[:4])
    assert few.draws.shape == (0, 2) and few.to_dict()["draws"] == []


def test_envelope_shows_the_optima_and_their_regressions():
    points = [{"compute": c, "params": 0.1 * c**0.5, "tokens": c**0.5 / 0.6, "loss": 3.0} for c in (1e16, 1e18, 1e20)]
    params = {"k_N": 0.1, "a": 0.5, "k_D": 1 / 0.6, "b": 0.5}
    shown = figures.envelope_figure({"form": "approach2", "points": points, "params": params})
    for key, name in (("params", "parameters N"), ("tokens", "tokens D")):
        [line], [dots] = marks(shown, Line, name), marks(shown, Points, name)
        assert dots.x == [1e16, 1e18, 1e20] and dots.y == [point[key] for point in points]
        assert (line.y[0], line.y[-1]) == pytest.approx((points[0][key], points[-1][key]))
    assert shown.panels[0].x.log and shown.panels[0].y.log


def test_a_curve_is_joined_in_order_of_x():
    curve = {"x": [0.9, 0.7, 0.8], "observed": [0.3, 0.6, 0.4], "fitted": [0.31, 0.59, 0.42]}
    shown = figures.curve_figure({"form": "downstream", "curve": curve})
    [line], [dots] = marks(shown, Line), marks(shown, Points)
    assert (line.x, line.y) == ([0.7, 0.8, 0.9], [0.59, 0.42, 0.31])
    assert (dots.x, dots.y) == ([0.9, 0.7, 0.8], [0.3, 0.6, 0.4])
    assert shown.panels[0].x.title == "bits per byte" and shown.panels[0].y.title == "accuracy"


def call(*words):
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code


@pytest.fixture
def two_arms(tmp_path):
    runs, path = surface_runs(0.003), tmp_path / "runs.csv"
    rows = ["params,tokens,loss,arm"]
    for arm, times in (("a", 0.98), ("b", 1.0)):
        rows += [
            f"{n},{d},{times * loss},{arm}" for n, d, loss in zip(runs.params, runs.tokens, runs.loss, strict=True)
        ]
    path.write_text("\n".join(rows))
    return path


def test_verbs_write_their_figures(two_arms, tmp_path, capsys):
    assert call("fit", two_arms, "--arm", "a", "--bootstrap", 10, "--figures", tmp_path / "surface") == 0
    assert sorted(p.name for p in (tmp_path / "surface").iterdir()) == [
        "bootstrap.svg", "loss-flops.svg", "loss-params.svg", "loss-tokens.svg", "residuals.svg",
    ]  # fmt: skip
    assert (
        call("fit", two_arms, "--arm", "a", "--form", "power", "--axis", "flops", "--figures", tmp_path / "power") == 0
    )
    assert "training FLOPs C" in (tmp_path / "power" / "loss-flops.svg").read_text()
    assert call("fit", two_arms, "--arm", "a", "--form", "approach1", "--figures", tmp_path / "envelope") == 0
    assert [p.name for p in (tmp_path / "envelope").iterdir()] == ["approach1.svg"]
    assert call("compare", two_arms, "--arms", "a", "b", "--figures", tmp_path / "gains") == 0
    names = {p.name for p in (tmp_path / "gains").iterdir()}
    assert names == {"gain-compute.svg", "gain-params.svg", "gain-data.svg", "frontier.svg", "paired.svg"}
    capsys.readouterr()
    assert call("compare", two_arms, "--arms", "a", "b", "--figures", two_arms) == 2
    assert "is a file; give a folder" in capsys.readouterr().err
    for verb in (["fit", two_arms, "--arm", "a"], ["compare", two_arms, "--arms", "a", "b"]):
        before = sorted(tmp_path.iterdir())
        for where, says in ((tmp_path, "is a folder; give a file"), (tmp_path / "no" / "x.json", "does not exist")):
            assert call(*verb, "--json", where) == 2
            captured = capsys.readouterr()
            assert says in captured.err and captured.err.count("\n") == 1 and not captured.out
        assert sorted(tmp_path.iterdir()) == before
