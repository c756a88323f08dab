"""Figures of a study as plotly figures, in the colours of Okabe and Ito, which colour-blind readers tell apart.

Every function takes plain numbers and returns a Figure without size, title or background, so that it fits a page, a
notebook, light and dark. Names that come from files are escaped here, since plotly reads markup in text.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from qies.report.text import si

# Okabe and Ito 2008; black and yellow, which vanish on a dark and on a light page, give way to grey.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
KNOWN = ("transformer", "qies", "no_phase", "fixed_phase", "complex", "gpt2")
GREY = PALETTE[-1]
GRID = "rgba(128,128,128,0.28)"


@dataclass(frozen=True)
class Style:
    """Colour "#rrggbb" and plotly's name of a marker."""

    colour: str
    symbol: str

    def faint(self, opacity: float = 0.14) -> str:
        r, g, b = (int(self.colour[i : i + 2], 16) for i in (1, 3, 5))
        return f"rgba({r},{g},{b},{opacity})"


def style(i: int) -> Style:
    return Style(PALETTE[i % len(PALETTE)], SYMBOLS[i % len(SYMBOLS)])


def styles(arms: Iterable[str]) -> dict[str, Style]:
    """A style per arm; the known arms keep theirs on every page."""
    return {arm: style(i) for i, arm in enumerate(dict.fromkeys([*KNOWN, *arms]))}


def loss_chart(
    points: Mapping[str, Sequence[tuple[float, float, str]]], curves: Mapping[str, Mapping[str, Any]], x_title: str
) -> go.Figure:
    """Validation loss on log axes: points (x, loss in nats per token, hover text) per arm, and fitted laws.

    curves: per arm {"x", "loss"} and, with an interval, {"lo", "hi"}, as `PowerLaw.curve()` gives them; the law is
    solid within the arm's data and dotted beyond, its interval shaded.
    """
    figure, looks = _figure(x_title, "validation loss (nats per token)"), styles(points)
    curves = {arm: curve for arm, curve in curves.items() if curve and points.get(arm)}
    for arm, curve in curves.items():
        look, x, data = looks[arm], curve["x"], [p[0] for p in points[arm]]
        shared = {"mode": "lines", "hoverinfo": "skip", "legendgroup": escape(arm), "showlegend": False}
        if "lo" in curve and "hi" in curve:
            outline = {"x": [*x, *reversed(x)], "y": [*curve["hi"], *reversed(curve["lo"])]}
            figure.add_scatter(**outline, fill="toself", fillcolor=look.faint(), line={"width": 0}, **shared)
        inside = [y if min(data) <= v <= max(data) else None for v, y in zip(x, curve["loss"], strict=True)]
        for y, dash in ((inside, "solid"), (curve["loss"], "dot")):
            figure.add_scatter(x=x, y=y, line={"color": look.colour, "width": 1.5, "dash": dash}, **shared)
    for arm, runs in points.items():
        figure.add_scatter(
            x=[p[0] for p in runs],
            y=[p[1] for p in runs],
            text=[escape(p[2]) for p in runs],
            mode="markers",
            name=escape(arm),
            legendgroup=escape(arm),
            marker=_marker(looks[arm], 10),
            hovertemplate="%{text}<br>%{y:.4f} nats per token<extra></extra>",
        )
    xs = [p[0] for runs in points.values() for p in runs]
    # The bands open fast beyond the data: the axis follows points and laws, not bands.
    ys = [p[1] for runs in points.values() for p in runs] + [y for c in curves.values() for y in c["loss"]]
    _log_axis(figure, "x", min(xs) / 1.5, 3 * max(xs))
    _log_axis(figure, "y", min(ys) / 1.03, 1.03 * max(ys))
    return figure


def line_chart(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x_title: str,
    y_title: str,
    *,
    markers: bool = False,
    log: str = "",
) -> go.Figure:
    """One line per arm, (x, y) each; `log` names the logarithmic axes ("x", "y", "xy"), where values are positive."""
    figure, looks = _figure(x_title, y_title), styles(series)
    for arm, (x, y) in series.items():
        figure.add_scatter(
            x=list(x),
            y=list(y),
            name=escape(arm),
            mode="lines+markers" if markers else "lines",
            line={"color": looks[arm].colour, "width": 1.8},
            marker=_marker(looks[arm], 9),
            hovertemplate=f"%{{x:.3s}}: %{{y:.4g}}<extra>{escape(arm)}</extra>",
        )
    for axis, values in zip("xy", zip(*series.values(), strict=True), strict=True):
        every = [v for part in values for v in part]
        if axis in log and min(every) > 0:
            _log_axis(figure, axis, min(every) / 1.1, 1.1 * max(every))
    return figure


def entropy_chart(layers: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Entropies of every head of a model against ceiling and Page; `layers` as in entanglement.json."""
    figure = _figure("layer (its heads from left to right)", "entropy (nats)")
    heads = [(str(layer["layer"]), head) for layer in layers for head in layer["heads"]]
    names = [f"layer {escape(layer)}, head {escape(head['head'])}" for layer, head in heads]
    edges = [i + side for i in range(len(heads)) for side in (-0.5, 0.5)]
    for key, name, dash in (("ceiling", "ceiling log min(m, V)", "solid"), ("page", "Page, random state", "dash")):
        figure.add_scatter(
            x=edges,
            y=[head[key] for _, head in heads for _ in (0, 1)],
            mode="lines",
            name=name,
            line={"color": GREY, "dash": dash, "width": 1.5},
            hovertemplate=f"%{{y:.3f}} nats<extra>{name}</extra>",
        )
    for look, key, name in ((style(3), "von_neumann", "von Neumann"), (style(4), "renyi2", "Rényi-2")):
        figure.add_scatter(
            x=list(range(len(heads))),
            y=[head[key][0] for _, head in heads],
            error_y={"array": [head[key][1] for _, head in heads], "thickness": 1, "width": 3},
            text=names,
            name=name,
            mode="markers",
            marker=_marker(look, 9),
            hovertemplate=f"%{{text}}<br>%{{y:.3f}} nats<extra>{name}</extra>",
        )
    first = {layer: i for i, (layer, _) in reversed(list(enumerate(heads)))}
    ticks = {"tickvals": list(first.values()), "ticktext": list(map(escape, first))}
    figure.update_layout(xaxis={**ticks, "zeroline": False}, yaxis={"rangemode": "tozero"})
    return figure


def spectrum_chart(spectra: Mapping[str, Sequence[float]]) -> go.Figure:
    """Schmidt probabilities p_i on a log axis, one line each; a flat line would be maximal entanglement."""
    figure = _figure("Schmidt index i", "mean probability p_i")
    for i, (name, p) in enumerate(spectra.items()):
        figure.add_scatter(
            x=list(range(1, len(p) + 1)),
            y=list(p),
            name=escape(name),
            mode="lines+markers",
            line={"color": style(i).colour, "width": 1.5},
            marker=_marker(style(i), 7),
            hovertemplate=f"i = %{{x}}: %{{y:.3g}}<extra>{escape(name)}</extra>",
        )
    shown = [v for p in spectra.values() for v in p if v > 1e-8]  # rounding noise of float32 spectra lies below
    _log_axis(figure, "y", min(shown) / 1.3, 1.2 * max(shown))
    figure.update_xaxes(dtick=1 + max(map(len, spectra.values())) // 12)
    return figure


def escape(text: Any) -> str:
    """Text for plotly, which reads a subset of HTML and decodes entities."""
    return html.escape(str(text), quote=False)


def log_ticks(low: float, high: float) -> dict[float, str]:
    """Positions and labels on a log axis: even steps over a small range, else 1, 2, 5 or powers of ten."""
    if high < 7 * low:
        unit = 10.0 ** math.floor(math.log10((high - low) / 7))
        step = next(f * unit for f in (1, 2, 5, 10) if 7 * f * unit >= high - low)
        values = [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    else:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        factors, every = ((1, 2, 5), 1) if high < 500 * low else ((1,), 1 + len(powers) // 9)
        values = [float(f"{f}e{p}") for p in powers if p % every == 0 for f in factors]
    return {v: si(v, 6) for v in values if low <= v <= high}


def _figure(x_title: str, y_title: str) -> go.Figure:
    axis = {"gridcolor": GRID, "linecolor": GRID, "zerolinecolor": GRID, "automargin": True}
    return go.Figure(
        layout={
            "template": "none",
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
            "dragmode": False,  # a finger on a chart scrolls the page
            "hovermode": "closest",
            "showlegend": True,
            "xaxis": {**axis, "title": {"text": x_title, "standoff": 8}},
            "yaxis": {**axis, "title": {"text": y_title, "standoff": 8}},
            "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.01, "x": 0},
        }
    )


def _marker(look: Style, size: int) -> dict[str, Any]:
    return {"color": look.colour, "symbol": look.symbol, "size": size}


def _log_axis(figure: go.Figure, axis: str, low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    figure.update_layout(
        {
            f"{axis}axis": {
                "type": "log",
                "range": [math.log10(low), math.log10(high)],
                "tickvals": list(ticks),
                "ticktext": list(ticks.values()),
            }
        }
    )
