"""Figures of fits and comparisons. Each takes a result or its `to_dict()`, so that stored JSON draws the same figure.

Losses are in nats per token, N parameters, D tokens, C FLOPs. A law is drawn faint where it is extrapolated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations, count
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from qies.errors import UserError, unknown
from qies.plotting import GREY, Axis, Band, Figure, Line, Note, Panel, Points, Style, style, styles
from qies.plotting.axes import si
from qies.plotting.marks import Mark
from qies.scaling.laws.forms import surface_form
from qies.scaling.laws.frontier import SIX_ND, optimum

LOSS = "validation loss (nats per token)"
AXES = {"params": "parameters N", "tokens": "training tokens D", "flops": "training FLOPs C"}
CURVE_AXES = {"annealing": ("training step", "loss (nats per token)"), "downstream": ("bits per byte", "accuracy")}
# By kind of gain: the key of x, the axis of x, what is saved.
GAINS = {
    "compute": ("compute", "training FLOPs of the candidate", "FLOPs"),
    "params": ("params", "parameters of the candidate", "parameters"),
    "data": ("tokens", "training tokens of the candidate", "tokens"),
    "time": ("time", "wall-clock seconds of the candidate", "seconds"),
}
# A law read up to 2 % beyond its runs is still inside them (sizes of one level differ by as much).
INSIDE = 1.02
# Bands of a gain are shown to this factor beyond the curve, so that an open one leaves the curve readable.
BAND_REACH = 2.0
REFERENCE = Style(GREY.colour, dash="dot")  # of lines that are no arm's
LEVELS = 6  # curves of a surface in one figure
NAMED = 8  # outliers written out in one figure

Result = Any  # a result of this package, or the dict that its to_dict() gives


def loss_figure(
    title: str,
    x: Axis,
    points: Mapping[str, Sequence[tuple[float, float, str]]],
    curves: Mapping[str, Mapping[str, Sequence[float | None]]],
) -> Figure:
    """Loss on log axes: points (x, loss, hover text) per arm, and laws {"x", "loss"} with, where known, "lo", "hi"."""
    looks, marks = styles(points), list[Mark]()
    curves = {arm: curve for arm, curve in curves.items() if curve and points.get(arm)}
    for arm, curve in curves.items():
        data = [p[0] for p in points[arm]]
        marks += _law(curve, looks[arm], min(data), max(data), arm)
    for arm, runs in points.items():
        xs, ys, hover = zip(*runs, strict=True)
        marks.append(Points(xs, ys, arm, looks[arm], hover))
    return Figure(title, [Panel(x, Axis(LOSS, log=True), marks)])


def power_figure(law: Result, x: ArrayLike = (), loss: ArrayLike = (), variable: str = "x") -> Figure:
    """A power law with its band, and the runs (x, loss) it was fitted to; `variable` names x with its unit."""
    xs, losses = (np.asarray(v, np.float64).reshape(-1).tolist() for v in (x, loss))
    plain, look = _plain(law), style(0)
    low, high = plain["x_range"]
    marks = _law(plain["curve"], look, low, high, "law")
    if xs:
        marks.append(Points(xs, losses, "runs", look, [f"{variable} = {si(v)}" for v in xs]))
    return Figure(f"Power law in {variable}", [Panel(Axis(variable, log=True), Axis(LOSS, log=True), marks)])


def surface_figure(fit: Result, runs: Any = None, axis: str = "flops") -> Figure:
    """Runs and a law of N and D against one of "params", "tokens", "flops".

    Against N (or D): a curve for each of up to six levels of D (or N), with the runs of that level in its colour.
    Against C: the runs and the frontier, the least loss at C = 6ND. `runs` (`qies.scaling.tables.runs.Runs`) give the
    points; without them the fit's residual table does, with C = 6ND. Bands need a fit, not its dict.
    """
    if axis not in AXES:
        raise unknown("axis", axis, AXES)
    plain = _plain(fit)
    n, d, c, loss, names = _columns(plain, runs)
    predict = getattr(fit, "predict_band", None) or _predictor(plain)
    x_axis, title = Axis(AXES[axis], log=True), f"Loss against {AXES[axis]}, {plain['form']}"
    marks: list[Mark] = []
    if axis == "flops":
        grid = np.geomspace(c.min() / 1.5, 3 * c.max(), 61)
        best = _optimum(plain, grid)
        if best is not None:
            curve = {"x": grid.tolist(), **_curve(predict(*best))}
            marks += _law(curve, style(1), c.min(), c.max(), "least loss at C")
        marks.append(Points(c.tolist(), loss.tolist(), "runs", style(0), names))
        return Figure(title, [Panel(x_axis, Axis(LOSS, log=True), marks)])
    along, other, letter = (n, d, "D") if axis == "params" else (d, n, "N")
    level = np.array([float(f"{v:.2g}") for v in other])
    shown = _spread(level)
    for i, value in enumerate(shown):
        mine = level == value
        low, high = along[mine].min(), along[mine].max()
        grid = np.geomspace(low / 1.2, 2 * high, 41)
        held = np.full_like(grid, float(np.exp(np.log(other[mine]).mean())))
        name = f"{letter} = {si(value, 2)}"
        curve = {"x": grid.tolist(), **_curve(predict(*((grid, held) if axis == "params" else (held, grid))))}
        marks += _law(curve, style(i), low, high, name)
        marks.append(_some(mine, along, loss, names, name, style(i)))
    rest = ~np.isin(level, shown)
    if rest.any():
        marks.append(_some(rest, along, loss, names, f"other {letter}", Style(GREY.colour, "circle")))
    return Figure(title, [Panel(x_axis, Axis(LOSS, log=True), marks)])


def residual_figure(fit: Result) -> Figure:
    """How far each run lies from the fitted law, in percent of the loss; outliers are named."""
    return residuals_figure({str(_plain(fit).get("form", "runs")): _plain(fit)["residuals"]})


def residuals_figure(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Residual tables of several laws or arms in one figure; a row holds name, loss, predicted, residual, outlier."""
    looks, marks, notes = styles(tables), list[Mark](), list[Note]()
    every = [row["predicted"] for table in tables.values() for row in table]
    if not every:
        raise UserError("there is no residual to draw; the fit holds no runs")
    marks.append(Line([min(every), max(every)], [0.0, 0.0], style=REFERENCE))
    if len(tables) == 1:
        looks = dict.fromkeys(tables, style(0))
    for name, table in tables.items():
        percent = [100 * math.expm1(row["residual"]) for row in table]
        hover = [f"{row['name']}: loss {row['loss']:.4f}, law {row['predicted']:.4f}" for row in table]
        marks.append(Points([row["predicted"] for row in table], percent, name, looks[name], hover))
        far = [Note(r["predicted"], p, str(r["name"])) for r, p in zip(table, percent, strict=True) if r["outlier"]]
        notes += far
    named: dict[str, Note] = {}  # each name once, where it is furthest
    for note in sorted(notes, key=lambda note: -abs(note.y)):
        named.setdefault(note.text, note)
    axes = Axis("loss by the law (nats per token)", log=True), Axis("run against law (% of loss)")
    return Figure("Residuals", [Panel(*axes, [*marks, *list(named.values())[:NAMED]])])


def bootstrap_figure(fit: Result, title: str = "") -> Figure:
    """Bootstrap draws of every pair of parameters, with the fit's own values: which trade off against each other.

    Needs `draws` [bootstrap, p] in the order of `params`. Raises UserError when there are none.
    """
    plain = _plain(fit)
    names, values = list(plain["params"]), list(plain["params"].values())
    draws = np.asarray(getattr(fit, "draws", plain.get("draws", ())), np.float64)
    if draws.size == 0:
        raise UserError("this fit holds no bootstrap draws; fit with --bootstrap 400 (bootstrap=400)")
    axes = [_parameter_axis(name, draws[:, i]) for i, name in enumerate(names)]
    panels = [
        Panel(axes[i], axes[j], [
            Points(draws[:, i].tolist(), draws[:, j].tolist(), "bootstrap draws", style(0), faint=True),
            Points([values[i]], [values[j]], "fit", Style(style(1).colour, "diamond")),
        ])
        for i, j in combinations(range(len(names)), 2)
    ]  # fmt: skip
    return Figure(title or f"Bootstrap of {plain['form']}", panels, columns=min(3, len(panels)))


def gain_figure(comparison: Result | Sequence[Result], kind: str = "compute") -> Figure:
    """Gain curves with their bands and the line at 1; several comparisons stand in one figure.

    kind: "compute" (how many times the candidate's FLOPs the baseline needs for the same loss), "params", "data",
    "time". Raises UserError for another kind, or where no comparison knows this gain.
    """
    if kind not in GAINS:
        raise unknown("gain", kind, GAINS)
    key, x_title, unit = GAINS[kind]
    pairs = [p for p in _several(comparison) if p["gain"]["curves"].get(kind)]
    looks = _pair_styles(pairs)
    bands, lines, seen, xs = list[Mark](), list[Mark](), [1.0], list[float]()
    ends: list[float] = []
    for pair, look in zip(pairs, looks, strict=True):
        curve = pair["gain"]["curves"][kind]
        x, gain, lo, hi = ([point[k] for point in curve] for k in (key, "gain", "lo", "hi"))
        bands.append(Band(x, lo, hi, look))
        inside = [point["reach"] <= INSIDE for point in curve]
        lines += _faint_beyond(x, gain, inside, look, pair_name(pair))
        xs += x
        seen += [g for g in gain if g is not None]
        # Where the baseline's law does not reach the loss, a band without a curve: room on its open side.
        out = [(a, b) for g, a, b in zip(gain, lo, hi, strict=True) if g is None and a is not None]
        seen += [a * BAND_REACH if b is None else b / BAND_REACH for a, b in out]
        ends += [v for v in (*lo, *hi) if v]
    if not xs:
        raise UserError(f"no gain in {kind} is known for these arms")
    low, high = min(seen), max(seen)
    kept = [min(max(v, low / BAND_REACH), high * BAND_REACH) for v in ends]
    y = Axis(f"gain (times the {unit}, same loss)", True, min([low, *kept]) / 1.03, max([high, *kept]) * 1.03)
    one = Line([min(xs), max(xs)], [1.0, 1.0], "no gain", REFERENCE)
    title = "Compute-equivalent gain" if kind == "compute" else f"Gain in {unit}"
    return Figure(title, [Panel(Axis(x_title, log=True), y, [*bands, *lines, one])])


def frontier_figure(comparison: Result | Sequence[Result]) -> Figure:
    """Each arm's least loss at each compute, with its band and its runs; crossings of a single pair are named."""
    pairs = _several(comparison)
    arms = _arms(pairs)
    looks = styles(arms)
    bands, lines, points, notes = list[Mark](), list[Mark](), list[Mark](), list[Mark]()
    for arm in arms:
        pair = next(p for p in pairs if arm in (p["candidate"], p["baseline"]))
        curve = pair["frontier"].get(arm, ())
        if curve:
            x, loss, lo, hi = ([point[k] for point in curve] for k in ("compute", "loss", "lo", "hi"))
            bands.append(Band(x, lo, hi, looks[arm]))
            lines += _faint_beyond(x, loss, [point["reach"] <= INSIDE for point in curve], looks[arm], arm)
        cells = pair["losses"][arm]
        hover = [f"{arm}, N = {si(n)}, D = {si(d)}, C = {si(c)}" for c, n, d, _ in cells]
        points.append(Points([c[0] for c in cells], [c[3] for c in cells], arm, looks[arm], hover))
    if len(pairs) == 1:
        line = pairs[0]["frontier"].get(arms[0], ())
        x, loss = ([point[k] for point in line] for k in ("compute", "loss"))
        for crossing in pairs[0]["crossings"]:
            at = crossing["compute"]
            if x and x[0] <= at <= x[-1]:
                notes.append(Note(at, float(np.exp(np.interp(math.log(at), np.log(x), np.log(loss)))), "laws cross"))
    panel = Panel(Axis(AXES["flops"], log=True), Axis(LOSS, log=True), [*bands, *lines, *points, *notes])
    return Figure("Frontier: least loss at each compute", [panel])


def paired_figure(comparison: Result | Sequence[Result]) -> Figure:
    """Candidate minus baseline at each matched size and token budget, with intervals over seeds where there are any."""
    pairs = [pair for pair in _several(comparison) if pair["paired"]]
    if not pairs:
        raise UserError("the arms have no size and token budget in common, so nothing is paired")
    every = [row["params"] for pair in pairs for row in pair["paired"]]
    marks: list[Mark] = [Line([min(every), max(every)], [0.0, 0.0], "no difference", REFERENCE)]
    for i, (pair, look) in enumerate(zip(pairs, _pair_styles(pairs), strict=True)):
        rows = pair["paired"]
        beside = 1.04 ** (i - (len(pairs) - 1) / 2)  # side by side, so that no pair hides another
        marks.append(
            Points(
                [row["params"] * beside for row in rows],
                [row["difference"] for row in rows],
                pair_name(pair, "minus"),
                look,
                [f"N = {si(row['params'])}, D = {si(row['tokens'])}, {row['test']}, n = {row['n']}" for row in rows],
                [row["lo"] for row in rows],
                [row["hi"] for row in rows],
            )
        )
    axes = Axis(AXES["params"], log=True), Axis("difference (nats per token)")
    return Figure("Difference at each matched size", [Panel(*axes, marks)])


def comparison_figures(comparison: Result) -> dict[str, Figure]:
    """Every figure that a comparison has the numbers for, by a name for its file."""
    plain = _plain(comparison)
    shown = {f"gain-{kind}": gain_figure(plain, kind) for kind in GAINS if plain["gain"].get(kind)}
    if plain["frontier"]:
        shown["frontier"] = frontier_figure(plain)
    if plain["paired"]:
        shown["paired"] = paired_figure(plain)
    return shown


def envelope_figure(fit: Result) -> Figure:
    """The best N and D at each compute, and the regressions N = k_N C^a, D = k_D C^b."""
    plain = _plain(fit)
    points, params = plain["points"], plain["params"]
    compute = [point["compute"] for point in points]
    grid = np.geomspace(min(compute), max(compute), 50)
    marks: list[Mark] = []
    for i, (key, k, exponent, name) in enumerate(
        (("params", "k_N", "a", "parameters N"), ("tokens", "k_D", "b", "tokens D"))
    ):
        hover = [f"C = {si(point['compute'])}, loss {point['loss']:.4f}" for point in points]
        marks.append(Line(grid.tolist(), (params[k] * grid ** params[exponent]).tolist(), name, style(i)))
        marks.append(Points(compute, [point[key] for point in points], name, style(i), hover))
    axes = Axis("training FLOPs C", log=True), Axis("best parameters N, tokens D", log=True)
    return Figure(f"Compute-optimal size, {plain['form']}", [Panel(*axes, marks)])


def forms_figure(comparison: Result) -> Figure:
    """How far the AIC of each form is above the lowest, against the form's number of parameters."""
    scores = _plain(comparison)["scores"]
    count = [score["parameters"] for score in scores]
    above = [score["aic"] - scores[0]["aic"] for score in scores]
    hover = [f"{score['form']}: AIC {score['aic']:.1f}, BIC {score['bic']:.1f}" for score in scores]
    names = [Note(x, y, score["form"]) for x, y, score in zip(count, above, scores, strict=True)]
    axes = Axis("parameters of the form"), Axis("AIC above the lowest")
    return Figure("Forms of the law", [Panel(*axes, [Points(count, above, "", style(0), hover), *names])])


def curve_figure(fit: Result) -> Figure:
    """The points of a curve and the law through them, in order of x."""
    plain = _plain(fit)
    x_title, y_title = CURVE_AXES[plain["form"]]
    x, observed, fitted = (np.asarray(plain["curve"][k], np.float64) for k in ("x", "observed", "fitted"))
    order = np.argsort(x, kind="stable")
    marks: list[Mark] = [
        Points(x.tolist(), observed.tolist(), "data", style(0), faint=len(x) > 60),
        Line(x[order].tolist(), fitted[order].tolist(), plain["form"], style(1)),
    ]
    return Figure(f"Law of the curve, {plain['form']}", [Panel(Axis(x_title), Axis(y_title), marks)])


def pair_name(pair: Mapping[str, Any], word: str = "over") -> str:
    return f"{pair['candidate']} {word} {pair['baseline']}"


def _plain(result: Result) -> Mapping[str, Any]:
    return result if isinstance(result, Mapping) else result.to_dict()


def _several(comparison: Result | Sequence[Result]) -> list[Mapping[str, Any]]:
    return [_plain(c) for c in (comparison if isinstance(comparison, list | tuple) else [comparison])]


def _arms(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every arm once, in the order that gives it the same style in every figure of these comparisons."""
    return list(dict.fromkeys(arm for pair in pairs for arm in (pair["baseline"], pair["candidate"])))


def _pair_styles(pairs: Sequence[Mapping[str, Any]]) -> list[Style]:
    """A candidate keeps its arm's style in its first pair and takes another, from the fourth on, in further ones."""
    names = [pair["candidate"] for pair in pairs]
    looks, again = styles(_arms(pairs)), count(3)
    return [style(next(again)) if name in names[:i] else looks[name] for i, name in enumerate(names)]


def _law(curve: Mapping[str, Any], look: Style, low: float, high: float, name: str) -> list[Mark]:
    """A law within low..high and, faint, beyond, over its band."""
    x, loss, marks = curve["x"], curve["loss"], list[Mark]()
    if curve.get("lo") and curve.get("hi"):
        marks.append(Band(x, curve["lo"], curve["hi"], look))
    inside = [low * (1 - 1e-9) <= v <= high * (1 + 1e-9) for v in x]
    return marks + _faint_beyond(x, loss, inside, look, name)


def _faint_beyond(
    x: Sequence[float], y: Sequence[float | None], inside: Sequence[bool], look: Style, name: str
) -> list[Mark]:
    """The whole line faint, and what lies inside the runs over it."""
    if all(inside):
        return [Line(x, y, name, look)]
    return [Line(x, y, "", look, faint=True), Line(x, [v if i else None for v, i in zip(y, inside, strict=True)],
                                                   name, look)]  # fmt: skip


def _columns(plain: Mapping[str, Any], runs: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """N, D, C, loss [n] and names of the runs, of those that can be drawn."""
    if runs is None:
        rows = plain["residuals"]
        n, d, loss = (np.array([row[k] for row in rows], np.float64) for k in ("params", "tokens", "loss"))
        c, names = 6 * n * d, [str(row["name"]) for row in rows]
    else:
        n, d, c, loss, names = runs.params, runs.tokens, runs.flops, runs.loss, list(runs.name)
    keep = np.all([np.isfinite(v) & (v > 0) for v in (n, d, c, loss)], axis=0)
    if not keep.any():
        raise UserError("no run with parameters, tokens and a finite loss to draw")
    return n[keep], d[keep], c[keep], loss[keep], [name for name, k in zip(names, keep, strict=True) if k]


def _reducible(plain: Mapping[str, Any]) -> tuple[float, float, float, float]:
    return surface_form(plain["form"]).reducible(plain["params"])


def _predictor(plain: Mapping[str, Any]) -> Any:
    """(N, D) -> (loss, None, None) of a stored law: E + (A N^-alpha + B D^-beta)^gamma covers every form."""
    a, alpha, b, beta = _reducible(plain)
    e, gamma = plain["params"]["E"], plain["params"].get("gamma", 1.0)
    return lambda n, d: (e + (a * n**-alpha + b * d**-beta) ** gamma, None, None)


def _optimum(plain: Mapping[str, Any], compute: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """N and D [n] of lowest loss at C = 6ND, or None where the law does not fall with both."""
    try:
        return tuple(np.exp(optimum(_reducible(plain), SIX_ND, np.log(compute))).T)
    except ValueError:
        return None


def _curve(band: tuple[Any, Any, Any]) -> dict[str, list[float | None]]:
    parts = dict(zip(("loss", "lo", "hi"), band, strict=True))
    return {
        k: [float(x) if math.isfinite(x) else None for x in np.asarray(v, np.float64)]
        for k, v in parts.items()
        if v is not None
    }


def _spread(level: np.ndarray) -> list[float]:
    """Up to `LEVELS` levels, evenly from the lowest to the highest of those with half as many runs as the fullest."""
    values, counts = np.unique(level, return_counts=True)
    full = values[2 * counts >= counts.max()]
    return full[np.unique(np.linspace(0, len(full) - 1, min(LEVELS, len(full))).round().astype(int))].tolist()


def _some(pick: np.ndarray, x: np.ndarray, y: np.ndarray, names: Sequence[str], name: str, look: Style) -> Points:
    hover = [text for text, chosen in zip(names, pick, strict=True) if chosen]
    return Points(x[pick].tolist(), y[pick].tolist(), name, look, hover)


def _parameter_axis(name: str, values: np.ndarray) -> Axis:
    """Log where draws spread over more than a factor of 20, as amplitudes do."""
    low, high = float(values.min()), float(values.max())
    return Axis(name, log=low > 0 and high > 20 * low)
