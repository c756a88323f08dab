"""Figures of training curves, induction and entanglement; those of fits and comparisons are in scaling.figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qies.plotting import GREY, Axis, Band, Figure, Line, Panel, Points, Style, style, styles
from qies.plotting.figure import Mark

# Schmidt probabilities below this are rounding noise of float32 spectra.
NOISE = 1e-8


def line_chart(
    title: str,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x_title: str,
    y_title: str,
    *,
    markers: bool = False,
    log: str = "",
) -> Figure:
    """One line per arm, (x, y) each; `log` names the logarithmic axes ("x", "y", "xy")."""
    looks = styles(series)
    marks = [Line(x, y, arm, looks[arm], markers=markers) for arm, (x, y) in series.items()]
    return Figure(title, [Panel(Axis(x_title, "x" in log), Axis(y_title, "y" in log), marks)])


def induction_chart(title: str, series: Mapping[str, tuple[Sequence[float], ...]], onset: float) -> Figure:
    """Induction gain against tokens: (tokens, mean, lowest, highest) per arm, and the line from which copying counts
    as set in."""
    looks = styles(series)
    every = [x for xs, *_ in series.values() for x in xs]
    marks: list[Mark] = [Band(xs, lo, hi, looks[arm]) for arm, (xs, _, lo, hi) in series.items()]
    marks.append(
        Line([min(every), max(every)], [onset, onset], f"onset, {onset:g} nats", Style(GREY.colour, dash="dot"))
    )
    marks += [Line(xs, mean, arm, looks[arm], markers=True) for arm, (xs, mean, *_) in series.items()]
    # A band asks for no room of its own, so the ends of the bands decide the axis.
    ends = [v for _, _, lo, hi in series.values() for v in (*lo, *hi)] + [0.0, onset]
    room = 0.05 * (max(ends) - min(ends))
    y = Axis("gain on the repeat (nats per token)", low=min(ends) - room, high=max(ends) + room)
    return Figure(title, [Panel(Axis("tokens seen", True), y, marks)])


def entropy_chart(title: str, layers: Sequence[Mapping[str, Any]]) -> Figure:
    """Entropies of every head of a model against ceiling and Page; `layers` as in entanglement.json."""
    heads = [(str(layer["layer"]), head) for layer in layers for head in layer["heads"]]
    names = [f"layer {layer}, head {head['head']}" for layer, head in heads]
    edges = [i + side for i in range(len(heads)) for side in (-0.5, 0.5)]
    marks: list[Mark] = [
        Line(edges, [head[key] for _, head in heads for _ in (0, 1)], name, Style(GREY.colour, dash=dash))
        for key, name, dash in (("ceiling", "ceiling log min(m, V)", "solid"), ("page", "Page, random state", "dash"))
    ]
    for i, key, name in ((3, "von_neumann", "von Neumann"), (4, "renyi2", "Rényi-2")):
        mean, deviation = ([head[key][k] for _, head in heads] for k in (0, 1))
        lo = [a - b for a, b in zip(mean, deviation, strict=True)]
        hi = [a + b for a, b in zip(mean, deviation, strict=True)]
        marks.append(Points(list(range(len(heads))), mean, name, style(i), names, lo, hi))
    first = {layer: float(i) for i, (layer, _) in reversed(list(enumerate(heads)))}
    x = Axis("layer (its heads from left to right)", ticks={i: layer for layer, i in first.items()})
    return Figure(title, [Panel(x, Axis("entropy (nats)", low=0.0), marks)])


def spectrum_chart(title: str, spectra: Mapping[str, Sequence[float]]) -> Figure:
    """Schmidt probabilities p_i on a log axis, one line each; a flat line would be maximal entanglement."""
    marks = [
        Line(list(range(1, len(p) + 1)), [v if v > NOISE else None for v in p], name, style(i), markers=True)
        for i, (name, p) in enumerate(spectra.items())
    ]
    step = 1 + max(map(len, spectra.values())) // 8
    ticks = {float(i): str(i) for i in range(1, 1 + max(map(len, spectra.values())), step)}
    return Figure(title, [Panel(Axis("Schmidt index i", ticks=ticks), Axis("mean probability p_i", log=True), marks)])
