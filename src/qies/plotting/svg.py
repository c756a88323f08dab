"""A figure as SVG: white background, no script, no font file, no link.

Sized for a paper's column: at 84 mm the type of a single panel comes out at 7 points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from zlib import crc32

from qies.plotting.figure import Axis, Band, Entry, Figure, Line, Note, Panel, Points
from qies.plotting.scale import Scale
from qies.plotting.style import Style

SINGLE, IN_A_GRID = (480, 330), (300, 240)  # width and height of a panel with its labels
FONT = 14
EM = 0.56  # mean width of a letter of a sans serif, in font sizes
INK, SOFT = "#24292f", "#dfe2e6"
NAME = 40  # letters of a name in the legend
DASHES = {"solid": "", "dash": "7 4", "dot": "2 3", "dashdot": "8 3 2 3", "longdash": "12 4", "longdashdot": "12 3 2 3"}
# Marker outlines around the origin, by the styles' symbols.
OUTLINES = {
    "circle": "M-5 0A5 5 0 1 1 5 0A5 5 0 1 1 -5 0Z",
    "square": "M-4.5-4.5H4.5V4.5H-4.5Z",
    "diamond": "M0-6.5L6.5 0L0 6.5L-6.5 0Z",
    "triangle-up": "M0-6.5L6 4.5H-6Z",
    "cross": "M-2-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z",
    "x": "M-6-4L-4-6L0-2L4-6L6-4L2 0L6 4L4 6L0 2L-4 6L-6 4L-2 0Z",
    "star": "M0-7L2-2L7-2L3 1L4.5 6L0 3L-4.5 6L-3 1L-7-2L-2-2Z",
}


@dataclass(frozen=True)
class Box:
    """The plotting area of a panel in pixels, and the scales that fill it."""

    left: float
    top: float
    right: float
    bottom: float
    x: Scale
    y: Scale

    def across(self, value: float) -> float:
        return self.left + (self.right - self.left) * self.x.at(value)

    def up(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * self.y.at(value)

    def place(self, x: float | None, y: float | None) -> tuple[float, float] | None:
        """Pixels of a point, or None where it is not known or an axis cannot show it."""
        if x is None or y is None:
            return None
        at = self.across(x), self.up(y)
        return at if all(map(math.isfinite, at)) else None

    def holds(self, at: tuple[float, float]) -> bool:
        return self.left - 0.5 <= at[0] <= self.right + 0.5 and self.top - 0.5 <= at[1] <= self.bottom + 0.5


def render(figure: Figure) -> str:
    """The whole file."""
    alone = len(figure.panels) == 1
    width, height = SINGLE if alone else IN_A_GRID
    font = FONT if alone else FONT - 2
    total = width * figure.columns
    legend, top = _legend(figure.legend(), total, font)
    bottom = top + height * -(-len(figure.panels) // figure.columns)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {bottom}" width="{total}" height="{bottom}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="{font}" role="img">',
        f"<title>{escape(figure.title)}</title>",
        f'<rect width="{total}" height="{bottom}" fill="#ffffff"/>',
        *legend,
    ]
    for i, panel in enumerate(figure.panels):
        row, column = divmod(i, figure.columns)
        # Several figures may stand in one document, so an identifier carries the figure's title.
        clip = f"clip-{crc32(figure.title.encode()):08x}-{i}"
        out += _panel(panel, column * width, top + row * height, width, height, font, clip)
    return "\n".join([*out, "</svg>\n"])


def _legend(entries: dict[str, Entry], width: float, font: int) -> tuple[list[str], int]:
    """Rows of line, marker and name from the upper left, and the height they take."""
    out, x, row = [], 12.0, 0
    for name, entry in entries.items():
        text = name if len(name) <= NAME else name[: NAME - 1] + "…"
        room = 42 + _width(text, font) + 16
        if x > 12 and x + room > width:
            x, row = 12.0, row + 1
        y = 18 + 20 * row
        if entry.line:
            out.append(_stroke(f"M{x:.1f} {y}h32", entry.style, 2))
        if entry.marker:
            out.append(_marker(entry.style, x + 16, y))
        out.append(f'<text x="{x + 40:.1f}" y="{y + 0.35 * font:.1f}" fill="{INK}">{escape(text)}</text>')
        x += room
    return out, 20 * (row + 1) + 4 if entries else 0


def _panel(panel: Panel, x: float, y: float, width: float, height: float, font: int, clip: str) -> list[str]:
    across, up = panel.scales(6 if width == SINGLE[0] else 4)
    labels = max((_width(text, font) for text in up.ticks.values()), default=0.0)
    left = x + 10 + 1.4 * font + labels + 8
    last = max((_width(text, font) / 2 for text in list(across.ticks.values())[-1:]), default=0.0)
    box = Box(left, y + 12, x + width - max(14.0, last + 2), y + height - 3.4 * font, across, up)
    out = _axes(panel, box, x, font)
    edge = f'width="{box.right - box.left:.1f}" height="{box.bottom - box.top:.1f}"'
    out.append(f'<clipPath id="{clip}"><rect x="{box.left:.1f}" y="{box.top:.1f}" {edge}/></clipPath>')
    notes: list[tuple[float, float, float, float]] = []
    for mark in panel.marks:
        if isinstance(mark, Band):
            out += _band(mark, box, clip)
        elif isinstance(mark, Line):
            out += _line(mark, box, clip)
        elif isinstance(mark, Points):
            out += _points(mark, box, 0.6 if panel.crowded else 1.0)
        else:
            out += _note(mark, box, font, notes)
    return out


def _axes(panel: Panel, box: Box, x: float, font: int) -> list[str]:
    out = [f'<g stroke="{SOFT}" fill="none">']
    out += [f'<path d="M{box.across(v):.1f} {box.top:.1f}V{box.bottom:.1f}"/>' for v in box.x.ticks]
    out += [f'<path d="M{box.left:.1f} {box.up(v):.1f}H{box.right:.1f}"/>' for v in box.y.ticks]
    out += ["</g>", f'<path d="M{box.left:.1f} {box.top:.1f}V{box.bottom:.1f}H{box.right:.1f}" stroke="{INK}" '
            'fill="none"/>', f'<g fill="{INK}">']  # fmt: skip
    floor = box.bottom + 1.25 * font
    for v, text in box.x.ticks.items():
        out.append(f'<text x="{box.across(v):.1f}" y="{floor:.1f}" text-anchor="middle">{escape(text)}</text>')
    for v, text in box.y.ticks.items():
        y = box.up(v) + 0.35 * font
        out.append(f'<text x="{box.left - 7:.1f}" y="{y:.1f}" text-anchor="end">{escape(text)}</text>')
    middle, centre = (box.left + box.right) / 2, (box.top + box.bottom) / 2
    place = f'x="{middle:.1f}" y="{box.bottom + 2.75 * font:.1f}"'
    out.append(f"<text {place} {_fitted(panel.x, box.right - box.left, font)}")
    turned = f'transform="translate({x + 6 + font:.1f} {centre:.1f}) rotate(-90)"'
    out.append(f"<text {turned} {_fitted(panel.y, box.bottom - box.top + 12, font)}")
    return [*out, "</g>"]


def _fitted(axis: Axis, room: float, font: int) -> str:
    """The rest of a text element with an axis's title, smaller where it would not fit."""
    size = min(1.0, room / max(_width(axis.title, font), 1.0)) * font
    smaller = "" if size == font else f' font-size="{size:.1f}"'
    return f'text-anchor="middle"{smaller}>{escape(axis.title)}</text>'


def _band(band: Band, box: Box, clip: str) -> list[str]:
    out = []
    for x, lo, hi in band.segments(box.y.low, box.y.high):
        outline = [*zip(x, hi, strict=True), *zip(reversed(x), reversed(lo), strict=True)]
        path = "L".join(f"{box.across(a):.1f} {box.up(b):.1f}" for a, b in outline)
        out.append(f'<path d="M{path}Z" fill="{band.style.colour}" fill-opacity="0.16" clip-path="url(#{clip})"/>')
    return out


def _line(line: Line, box: Box, clip: str) -> list[str]:
    path, joined = "", False
    places = [box.place(x, y) for x, y in zip(line.x, line.y, strict=True)]
    for at in places:
        if at is not None:
            path += f"{'L' if joined else 'M'}{at[0]:.1f} {at[1]:.1f}"
        joined = at is not None
    out = [_stroke(path, line.style, 1.4 if line.faint else 2, 0.55 if line.faint else 1, clip)] if path else []
    if line.markers:
        out += [_marker(line.style, *at) for at in places if at is not None and box.holds(at)]
    return out


def _points(points: Points, box: Box, size: float) -> list[str]:
    out = []
    for x, lo, hi in zip(points.x, points.lo, points.hi, strict=False):
        below, above = box.place(x, lo), box.place(x, hi)
        if below is not None and above is not None:
            (a, low), (_, high) = below, above
            whisker = f"M{a - 4:.1f} {low:.1f}h8M{a - 4:.1f} {high:.1f}h8M{a:.1f} {low:.1f}V{high:.1f}"
            out.append(_stroke(whisker, Style(points.style.colour), 1.4))
    places = [box.place(x, y) for x, y in zip(points.x, points.y, strict=True)]
    return out + [_marker(points.style, *at, size, points.faint) for at in places if at is not None and box.holds(at)]


def _note(note: Note, box: Box, font: int, taken: list[tuple[float, float, float, float]]) -> list[str]:
    """The words on the side with room, moved up or down where others stand already."""
    at = box.place(note.x, note.y)
    if at is None or not box.holds(at):
        return []
    size, wide = font - 2, _width(note.text, font - 2)
    x = at[0] + 8 if at[0] + 8 + wide < box.right else at[0] - 8 - wide
    steps = [0, *(side * n for n in range(1, 12) for side in (-1, 1))]
    rows = [at[1] + 0.35 * size + step * size for step in steps]
    free = [y for y in rows if box.top + size < y < box.bottom and not any(
        x < right and left < x + wide and abs(y - other) < size for left, right, other, _ in taken
    )]  # fmt: skip
    y = free[0] if free else rows[0]
    taken.append((x, x + wide, y, size))
    return [f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{INK}">{escape(note.text)}</text>']


def _stroke(path: str, look: Style, width: float, opacity: float = 1, clip: str = "") -> str:
    dash = f' stroke-dasharray="{DASHES[look.dash]}"' if DASHES[look.dash] else ""
    faint = "" if opacity == 1 else f' stroke-opacity="{opacity}"'
    inside = f' clip-path="url(#{clip})"' if clip else ""
    return f'<path d="{path}" fill="none" stroke="{look.colour}" stroke-width="{width}"{faint}{dash}{inside}/>'


def _marker(look: Style, x: float, y: float, size: float = 1.0, faint: bool = False) -> str:
    """A marker, open, so that those behind it stay visible; a small one without an edge for clouds."""
    size = 0.45 if faint else size
    place = f"translate({x:.1f} {y:.1f})" + ("" if size == 1 else f" scale({size})")
    paint = 'fill-opacity="0.4"' if faint else f'fill-opacity="0.25" stroke="{look.colour}" stroke-width="1.6"'
    return f'<path transform="{place}" d="{OUTLINES[look.symbol]}" fill="{look.colour}" {paint}/>'


def _width(text: str, font: float) -> float:
    return EM * font * len(text)
