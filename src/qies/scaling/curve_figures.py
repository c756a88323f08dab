"""Figures of envelopes, whole training curves, and accuracy against bits per byte; `figures` has the laws of N and D.

Each takes a result or its `to_dict()`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qies.plotting import Axis, Figure, Line, Note, Panel, Points, style
from qies.plotting.figure import Mark
from qies.plotting.scale import si

AXES = {"annealing": ("training step", "loss (nats per token)"), "downstream": ("bits per byte", "accuracy")}


def envelope_figure(fit: Any) -> Figure:
    """The best N and D at each compute, and the regressions N = k_N C^a, D = k_D C^b."""
    plain = fit if isinstance(fit, Mapping) else fit.to_dict()
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


def forms_figure(comparison: Any) -> Figure:
    """How far the AIC of each form is above the lowest, against the form's number of parameters."""
    scores = (comparison if isinstance(comparison, Mapping) else comparison.to_dict())["scores"]
    count = [score["parameters"] for score in scores]
    above = [score["aic"] - scores[0]["aic"] for score in scores]
    hover = [f"{score['form']}: AIC {score['aic']:.1f}, BIC {score['bic']:.1f}" for score in scores]
    names = [Note(x, y, score["form"]) for x, y, score in zip(count, above, scores, strict=True)]
    axes = Axis("parameters of the form"), Axis("AIC above the lowest")
    return Figure("Forms of the law", [Panel(*axes, [Points(count, above, "", style(0), hover), *names])])


def curve_figure(fit: Any) -> Figure:
    """The points of a curve and the law through them, in order of x."""
    plain = fit if isinstance(fit, Mapping) else fit.to_dict()
    x_title, y_title = AXES[plain["form"]]
    x, observed, fitted = (np.asarray(plain["curve"][k], np.float64) for k in ("x", "observed", "fitted"))
    order = np.argsort(x, kind="stable")
    marks: list[Mark] = [
        Points(x.tolist(), observed.tolist(), "data", style(0), faint=len(x) > 60),
        Line(x[order].tolist(), fitted[order].tolist(), plain["form"], style(1)),
    ]
    return Figure(f"Law of the curve, {plain['form']}", [Panel(Axis(x_title), Axis(y_title), marks)])
