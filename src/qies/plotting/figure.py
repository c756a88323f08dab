"""A figure as frozen data: panels of axes and marks (`marks`).

One description, two renderers: matplotlib for papers and print (`Figure.svg()`, `Figure.pdf()`) and plotly for pages
(`Figure.plotly()`). Text is plain text here; each renderer escapes it.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qies.errors import UserError
from qies.plotting.marks import Entry, Line, Panel, Points
from qies.storage import write_bytes, write_text


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
