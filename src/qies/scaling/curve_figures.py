"""Figures of the fits in one variable: power laws, envelopes, whole curves, accuracy against bits per byte (plotly)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

if TYPE_CHECKING:
    from qies.scaling.curves import CurveFit
    from qies.scaling.envelopes import EnvelopeFit
    from qies.scaling.laws import PowerLaw

# Okabe and Ito's colours, told apart by every kind of colour vision.
BLUE, ORANGE, SHADE = "#0072B2", "#D55E00", "rgba(0, 114, 178, 0.2)"
AXES = {"annealing": ("training step", "loss (nats a token)"), "downstream": ("bits per byte", "accuracy")}


def power_figure(fit: PowerLaw, title: str = "x") -> go.Figure:
    """The law and its band over log-log axes; `title` names x and its unit."""
    curve: dict[str, list[Any]] = fit.curve()
    figure = go.Figure()
    figure.add_scatter(x=curve["x"], y=curve["hi"], mode="lines", line={"width": 0}, showlegend=False)
    band = {"fill": "tonexty", "fillcolor": SHADE, "name": f"{100 * fit.level:g} % band"}
    figure.add_scatter(x=curve["x"], y=curve["lo"], mode="lines", line={"width": 0}, **band)
    figure.add_scatter(x=curve["x"], y=curve["loss"], mode="lines", line={"color": BLUE}, name=fit.form)
    return _laid_out(figure, title, "loss (nats a token)", "log", "log")


def envelope_figure(fit: EnvelopeFit) -> go.Figure:
    """Best parameters and tokens against compute, with the regressions."""
    compute = np.array([p.compute for p in fit.points])
    line = np.geomspace(compute.min(), compute.max(), 50)
    figure = go.Figure()
    observed = {"parameters": [p.params for p in fit.points], "tokens": [p.tokens for p in fit.points]}
    for (name, values), fitted, colour in zip(observed.items(), fit.optimum(line), (BLUE, ORANGE), strict=True):
        figure.add_scatter(x=compute, y=values, mode="markers", marker={"color": colour}, name=f"best {name}")
        figure.add_scatter(x=line, y=fitted, mode="lines", line={"color": colour}, name=f"{name}, fitted")
    return _laid_out(figure, "training compute (FLOPs)", "parameters, tokens", "log", "log")


def curve_figure(fit: CurveFit) -> go.Figure:
    """The points and the fitted curve."""
    x_title, y_title = AXES[fit.form]
    figure = go.Figure()
    figure.add_scatter(x=fit.curve["x"], y=fit.curve["observed"], mode="markers", marker={"color": ORANGE}, name="data")
    figure.add_scatter(x=fit.curve["x"], y=fit.curve["fitted"], mode="lines", line={"color": BLUE}, name=fit.form)
    return _laid_out(figure, x_title, y_title, "linear", "linear")


def _laid_out(figure: go.Figure, x: str, y: str, x_type: str, y_type: str) -> go.Figure:
    axes = {"xaxis": {"title": x, "type": x_type}, "yaxis": {"title": y, "type": y_type}}
    return figure.update_layout(template="plotly_white", **axes)
