"""Figures of the fits in one variable: envelopes of isoFLOP data, whole curves, accuracy against bits per byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qies.plotting import Axis, Figure, Line, Panel, Points, style

if TYPE_CHECKING:
    from qies.scaling.curves import CurveFit
    from qies.scaling.envelopes import EnvelopeFit

AXES = {"annealing": ("training step", "loss (nats per token)"), "downstream": ("bits per byte", "accuracy")}


def envelope_figure(fit: EnvelopeFit) -> Figure:
    """Best parameters and tokens against compute, with the regressions."""
    compute = [p.compute for p in fit.points]
    line = np.geomspace(min(compute), max(compute), 50)
    marks: list[Line | Points] = []
    observed = {"parameters": [p.params for p in fit.points], "tokens": [p.tokens for p in fit.points]}
    for i, ((name, values), fitted) in enumerate(zip(observed.items(), fit.optimum(line), strict=True)):
        marks.append(Line(line.tolist(), fitted.tolist(), f"best {name}", style(i)))
        marks.append(Points(compute, values, f"best {name}", style(i)))
    axes = Axis("training FLOPs C", log=True), Axis("parameters N, tokens D", log=True)
    return Figure(f"Optimum by {fit.form}", [Panel(*axes, marks)])


def curve_figure(fit: CurveFit) -> Figure:
    """The points and the fitted curve."""
    x, y = AXES[fit.form]
    curve = Line(list(fit.curve["x"]), list(fit.curve["fitted"]), fit.form, style(0))
    data = Points(list(fit.curve["x"]), list(fit.curve["observed"]), "data", style(1))
    return Figure(f"{fit.form} fit", [Panel(Axis(x), Axis(y), [curve, data])])
