"""What a figure shows, as frozen data: axes with units and the marks between them.

One description, two renderers: matplotlib for papers and print (`Figure.svg()`, `Figure.pdf()`) and plotly for pages
(`Figure.plotly()`). Text is plain text here; each renderer escapes it. A mark with a `name` has an entry in the legend;
marks of one name share it.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qies.errors import UserError
from qies.plotting.axes import Scale, make_scale
from qies.plotting.style import FIRST, Style
from qies.storage import write_bytes, write_text

CROWD = 60
# None stands for "not known" and leaves a gap.
Numbers = Sequence[float | None]


@dataclass(frozen=True)
class Axis:
    """`title` with its unit; `low` and `high` fix an end that otherwise follows points and lines.

    `ticks` (value -> label) replaces the ticks that would be chosen.
    """

    title: str
    log: bool = False
    low: float | None = None
    high: float | None = None
    ticks: Mapping[float, str] | None = None


@dataclass(frozen=True)
class Points:
    """Markers at (x, y); `hover` one text a point; `lo`, `hi` the ends of error bars; `faint` for clouds."""

    x: Numbers
    y: Numbers
    name: str = ""
    style: Style = FIRST
    hover: Sequence[str] = ()
    lo: Numbers = ()
    hi: Numbers = ()
    faint: bool = False


@dataclass(frozen=True)
class Line:
    """A line through (x, y), broken at None; `faint` where it is read beyond its data; `markers` at its points."""

    x: Numbers
    y: Numbers
    name: str = ""
    style: Style = FIRST
    faint: bool = False
    markers: bool = False


@dataclass(frozen=True)
class Band:
    """The area between `lo` and `hi` over x. None at one side: open there; at both: a gap. It asks for no range."""

    x: Sequence[float]
    lo: Numbers
    hi: Numbers
    style: Style = FIRST

    def segments(self, floor: float, ceiling: float) -> list[tuple[list[float], list[float], list[float]]]:
        """(x, lo, hi) of each stretch without a gap, kept within floor..ceiling, which also closes open sides."""
        out: list[tuple[list[float], list[float], list[float]]] = []
        joined = False
        for x, lo, hi in zip(self.x, self.lo, self.hi, strict=True):
            if lo is None and hi is None:
                joined = False
                continue
            if not joined:
                out.append(([], [], []))
            joined = True
            out[-1][0].append(x)
            out[-1][1].append(min(max(floor if lo is None else lo, floor), ceiling))
            out[-1][2].append(max(min(ceiling if hi is None else hi, ceiling), floor))
        return [part for part in out if len(part[0]) > 1]


@dataclass(frozen=True)
class Note:
    """A few words beside (x, y), such as the name of an outlier."""

    x: float
    y: float
    text: str


Mark = Points | Line | Band | Note


@dataclass(frozen=True)
class Panel:
    """Two axes and the marks between them, drawn in order."""

    x: Axis
    y: Axis
    marks: Sequence[Mark]

    @property
    def crowded(self) -> bool:
        """Whether so many points stand here that their markers are drawn smaller."""
        return sum(len(m.x) for m in self.marks if isinstance(m, Points) and not m.faint) > CROWD

    def scales(self, most: int) -> tuple[Scale, Scale]:
        """Both axes resolved, with at most so many ticks each. Raises ValueError when nothing can be drawn."""
        series = [m for m in self.marks if isinstance(m, Points | Line)]
        xs = [v for m in series for v in m.x]
        ys = [v for m in series for v in m.y] + [v for m in series if isinstance(m, Points) for v in (*m.lo, *m.hi)]
        return tuple(  # type: ignore[return-value]
            make_scale(values, axis.log, axis.low, axis.high, axis.ticks, most)
            for values, axis in ((xs, self.x), (ys, self.y))
        )


@dataclass(frozen=True)
class Entry:
    """What a legend shows beside a name."""

    style: Style
    line: bool
    marker: bool


@dataclass(frozen=True)
class Figure:
    """Panels in reading order, so many `columns` wide; `title` names the figure for screen readers and files."""

    title: str
    panels: Sequence[Panel]
    columns: int = 1

    def legend(self) -> dict[str, Entry]:
        """Every name once, in order of appearance; names are shown only where there is something to tell apart."""
        found: dict[str, Entry] = {}
        for mark in self._named():
            before = found.get(mark.name, Entry(mark.style, False, False))
            line = isinstance(mark, Line)
            marker = mark.markers if isinstance(mark, Line) else True
            found[mark.name] = Entry(before.style, before.line or line, before.marker or marker)
        return found

    def _named(self) -> Iterator[Points | Line]:
        for panel in self.panels:
            yield from (m for m in panel.marks if isinstance(m, Points | Line) and m.name)

    def svg(self) -> str:
        """A self-contained SVG on white, for a paper's column: no script, no font, no link; text is escaped."""
        from qies.plotting import static

        return static.svg(self)

    def pdf(self) -> bytes:
        """The same as PDF, with embedded fonts."""
        from qies.plotting import static

        return static.pdf(self)

    def plotly(self) -> dict[str, Any]:
        """{"data", "layout"} as plotly takes them, without title, size, font and background, so that it fits a page,
        a notebook, light and dark; `plotly.graph_objects.Figure(**figure.plotly())` shows it in a notebook."""
        from qies.plotting.interactive import render

        return render(self)

    def json(self) -> str:
        """`plotly()` for a script element: <, > and & are written as escapes, so that no text can close it."""
        text = json.dumps(self.plotly(), allow_nan=False)
        return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")

    def save(self, path: str | Path) -> Path:
        """Write .svg, .pdf, or .html (interactive, without any request to the network).

        Raises UserError for another suffix, and where the directory does not exist.
        """
        path = Path(path)
        kind = path.suffix.lower()
        if kind not in (".svg", ".pdf", ".html"):
            raise UserError(f"{path} is none of .svg, .pdf and .html; a figure is written as one of them.")
        if not path.parent.is_dir():
            raise UserError(f"{path.parent} is not a directory; create it first or write the figure elsewhere.")
        if kind == ".pdf":
            write_bytes(path, self.pdf())
        else:
            write_text(path, self.svg() if kind == ".svg" else self._page())
        return path

    def _page(self) -> str:
        from plotly.offline import get_plotlyjs

        rows = -(-len(self.panels) // self.columns)
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(self.title)}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1"></head>\n'
            f'<body style="margin: 0"><div id="figure" style="height: max(96vh, {280 * rows}px)"></div>\n'
            f"<script>{get_plotlyjs()}</script>\n"
            f'<script id="data" type="application/json">{self.json()}</script>\n'
            '<script>const { data, layout } = JSON.parse(document.getElementById("data").textContent);\n'
            'Plotly.newPlot("figure", data, layout, { responsive: true });</script></body></html>\n'
        )
