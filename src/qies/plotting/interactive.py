"""A figure as plotly's data and layout. Plotly reads markup in text, so every text is escaped here."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qies.plotting.axes import Scale
from qies.plotting.marks import Band, Entry, Line, Mark, Note, Panel, Points
from qies.plotting.style import Style

if TYPE_CHECKING:
    from qies.plotting.figure import Figure

GRID = "rgba(128,128,128,0.28)"
GAP = 0.11  # of the whole, between panels
TICKS, TICKS_IN_A_GRID = 6, 4  # few enough for a telephone


def render(figure: Figure) -> dict[str, Any]:
    """{"data", "layout"} of a figure."""
    legend = figure.legend()
    data = [_entry(name, entry) for name, entry in legend.items()]
    layout: dict[str, Any] = {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "dragmode": False,  # a finger on a chart scrolls the page
        "hovermode": "closest",
        "showlegend": bool(legend),
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.01, "x": 0},
        "annotations": [],
    }
    rows = -(-len(figure.panels) // figure.columns)
    for i, panel in enumerate(figure.panels):
        row, column = divmod(i, figure.columns)
        number = "" if i == 0 else str(i + 1)
        scales = panel.scales(TICKS if len(figure.panels) == 1 else TICKS_IN_A_GRID)
        places = _share(column, figure.columns), _share(rows - 1 - row, rows)
        for letter, other, axis, scale, place in zip("xy", "yx", (panel.x, panel.y), scales, places, strict=True):
            layout[f"{letter}axis{number}"] = _axis(axis.title, scale, place, f"{other}{number}")
        for mark in panel.marks:
            if isinstance(mark, Note):
                layout["annotations"].append(_note(mark, scales, number))
            else:
                data += [
                    trace | {"xaxis": f"x{number}", "yaxis": f"y{number}"} for trace in _traces(mark, panel, scales[1])
                ]
    return {"data": data, "layout": layout}


def escape(text: str) -> str:
    """Text for plotly, which reads a subset of HTML and decodes entities."""
    return html.escape(text, quote=False)


def _share(i: int, n: int) -> list[float]:
    width = (1 - GAP * (n - 1)) / n
    return [round(i * (width + GAP), 6), round(min(1.0, i * (width + GAP) + width), 6)]


def _axis(title: str, scale: Scale, domain: list[float], anchor: str) -> dict[str, Any]:
    ends = [scale.low, scale.high]
    return {
        "title": {"text": escape(title), "standoff": 8},
        "type": "log" if scale.log else "linear",
        "range": [math.log10(end) for end in ends] if scale.log else ends,
        "tickvals": list(scale.ticks),
        "ticktext": [escape(text) for text in scale.ticks.values()],
        "domain": domain,
        "anchor": anchor,
        "gridcolor": GRID,
        "linecolor": GRID,
        "zeroline": False,
        "automargin": True,
    }


def _traces(mark: Mark, panel: Panel, y: Scale) -> list[dict[str, Any]]:
    if isinstance(mark, Band):
        return [
            {
                "type": "scatter", "mode": "lines", "x": [*x, *reversed(x)], "y": [*hi, *reversed(lo)],
                "fill": "toself", "fillcolor": _faint(mark.style.colour, 0.16), "line": {"width": 0},
                "hoverinfo": "skip", "showlegend": False,
            }
            for x, lo, hi in mark.segments(y.low, y.high)
        ]  # fmt: skip
    assert isinstance(mark, Line | Points)
    trace: dict[str, Any] = {
        "type": "scatter",
        "x": list(mark.x),
        "y": list(mark.y),
        "name": escape(mark.name),
        "legendgroup": escape(mark.name),
        "showlegend": False,
        "hovertemplate": f"%{{x:.4s}}: %{{y:.4g}}<extra>{escape(mark.name)}</extra>",
    }
    ci: list[str] = []
    if isinstance(mark, Line):
        bands = [m for m in panel.marks if isinstance(m, Band) and m.style == mark.style and [*m.x] == [*mark.x]]
        ci = _intervals(bands[0].lo, bands[0].hi) if len(bands) == 1 else []
    elif mark.lo or mark.hi:
        ci = _intervals(mark.lo, mark.hi)
    if ci:
        trace["customdata"] = ci
        trace["hovertemplate"] = f"%{{x:.4s}}: %{{y:.4g}}%{{customdata}}<extra>{escape(mark.name)}</extra>"
    if isinstance(mark, Line):
        width, opacity = (1.2, 0.55) if mark.faint else (1.8, 1.0)
        markers = {"marker": _marker(mark.style, 7)} if mark.markers else {}
        return [
            trace | markers
            | {"mode": "lines+markers" if mark.markers else "lines", "opacity": opacity, "connectgaps": False,
               "line": {"color": mark.style.colour, "width": width, "dash": mark.style.dash}}
        ]  # fmt: skip
    trace |= {
        "mode": "markers",
        "marker": _cloud(mark.style) if mark.faint else _marker(mark.style, 6 if panel.crowded else 9),
    }
    if mark.hover:
        trace["text"] = [escape(text) for text in mark.hover]
        trace["hovertemplate"] = (
            f"%{{text}}<br>{escape(panel.y.title)}: %{{y:.4g}}{'%{customdata}' * bool(ci)}<extra></extra>"
        )
    if mark.lo or mark.hi:
        trace["error_y"] = {
            "type": "data",
            "symmetric": False,
            "array": _distance(mark.y, mark.hi),
            "arrayminus": _distance(mark.y, mark.lo),
            "color": mark.style.colour,
            "thickness": 1.2,
            "width": 3,
        }
    return [trace]


def _entry(name: str, entry: Entry) -> dict[str, Any]:
    """A trace without data that stands for a name in the legend, with line and marker where it has them."""
    mode = "lines+markers" if entry.line and entry.marker else "lines" if entry.line else "markers"
    return {
        "type": "scatter", "x": [None], "y": [None], "mode": mode, "name": escape(name), "legendgroup": escape(name),
        "showlegend": True, "marker": _marker(entry.style),
        "line": {"color": entry.style.colour, "width": 1.8, "dash": entry.style.dash},
    }  # fmt: skip


def _note(note: Note, scales: tuple[Scale, Scale], number: str) -> dict[str, Any]:
    x, y = (math.log10(v) if s.log else v for v, s in zip((note.x, note.y), scales, strict=True))
    left = scales[0].at(note.x) > 0.6
    return {
        "x": x, "y": y, "xref": f"x{number}", "yref": f"y{number}", "text": escape(note.text), "showarrow": False,
        "xanchor": "right" if left else "left", "xshift": -7 if left else 7, "yshift": 7,
    }  # fmt: skip


def _intervals(low: Sequence[float | None], high: Sequence[float | None]) -> list[str]:
    """The interval at each point for its hover: " (1.15 to 1.27)"; nothing where it is not known."""
    ends = [["unbounded" if v is None else f"{v:.4g}" for v in pair] for pair in zip(low, high, strict=True)]
    return ["" if set(pair) == {"unbounded"} else f" ({pair[0]} to {pair[1]})" for pair in ends]


def _distance(y: Sequence[float | None], end: Sequence[float | None]) -> list[float | None]:
    return [None if a is None or b is None else abs(b - a) for a, b in zip(y, end, strict=True)]


def _marker(look: Style, size: int = 9) -> dict[str, Any]:
    """Open, so that those behind it stay visible."""
    edge = {"color": look.colour, "width": 1.6}
    return {"color": _faint(look.colour, 0.25), "symbol": look.symbol, "size": size, "line": edge}


def _cloud(look: Style) -> dict[str, Any]:
    return {"color": _faint(look.colour, 0.4), "symbol": look.symbol, "size": 4}


def _faint(colour: str, opacity: float) -> str:
    r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r},{g},{b},{opacity})"
