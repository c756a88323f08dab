"""A figure drawn by matplotlib for papers and print: SVG, whose text stays text, and PDF.

Sized for a paper's column: at 84 mm the type of a single panel comes out at 7 points. The output is a function of the
figure alone: no date, no random identifier, no setting of a user's matplotlibrc.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree
from zlib import crc32

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from qies.plotting.axes import Scale
from qies.plotting.marks import Band, Line, Note, Panel, Points
from qies.plotting.style import Style

if TYPE_CHECKING:
    from qies.plotting.figure import Figure

SINGLE, IN_A_GRID = (480, 330), (300, 240)  # width and height of a panel with its labels, in points
FONT = 14
INK, SOFT = "#24292f", "#dfe2e6"
NAME = 40  # characters of a name in the legend
ROW = 1.45  # height of a legend's row, in font sizes
HANDLE = 3.8  # width of a legend's line with the space around it, in font sizes
# matplotlib's names of plotly's dashes (in line widths) and symbols.
DASHES: dict[str, Any] = {
    "solid": "-",
    "dash": (0, (3.5, 2)),
    "dot": (0, (1, 1.5)),
    "dashdot": (0, (4, 1.5, 1, 1.5)),
    "longdash": (0, (6, 2)),
    "longdashdot": (0, (6, 1.5, 1, 1.5)),
}
SYMBOLS = {
    "circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "cross": "P", "x": "X", "star": "*",
}  # fmt: skip
DECIMALS, COMMANDS = re.compile(r"\d+\.\d{2,}"), re.compile(r"\s*([A-Za-z])\s*")  # of paths, to shorten them
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
# DejaVu Sans comes with matplotlib, which measures text by it; the fonts that a reader has are narrower.
FAMILY = "Helvetica, Arial, sans-serif"
SETTINGS = {
    "font.family": ["DejaVu Sans"],
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": SOFT,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.pad": 6,
    "figure.dpi": 72,
    "savefig.dpi": 72,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}
# Characters that XML does not allow, and halves of pairs, which have no encoding.
ILLEGAL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def svg(figure: Figure) -> str:
    """The figure as SVG on white, without script, style sheet, font or link.

    Raises ValueError when an axis has nothing to draw.
    """
    salt = f"{crc32(_legal(figure.title).encode()):08x}"  # several figures may stand in one document
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    out = io.StringIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the reader's font draws them
        _configure()
        matplotlib.rcParams["svg.hashsalt"] = salt
        FigureCanvasSVG(_drawn(figure)).print_svg(out, metadata=nothing)
    return _clean(out.getvalue(), _legal(figure.title))


def pdf(figure: Figure) -> bytes:
    """The figure as PDF with embedded fonts. Raises ValueError when an axis has nothing to draw."""
    metadata = {"Title": _legal(figure.title), "CreationDate": None, "Creator": None, "Producer": None}
    out = io.BytesIO()
    with matplotlib.rc_context():
        _configure()
        FigureCanvasPdf(_drawn(figure)).print_pdf(out, metadata=metadata)
    return out.getvalue()


def _configure() -> None:
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(SETTINGS)


def _drawn(figure: Figure) -> Canvas:
    alone = len(figure.panels) == 1
    width, height = SINGLE if alone else IN_A_GRID
    font = FONT if alone else FONT - 2
    rows, total = -(-len(figure.panels) // figure.columns), width * figure.columns
    names = {name: _legal(name if len(name) <= NAME else name[: NAME - 1] + "…") for name in figure.legend()}
    canvas = Canvas(figsize=(1, 1))
    widest = max((_extent(canvas, text, font).width for text in names.values()), default=0.0)
    columns = max(1, min(len(names), int((total - 12) // (widest + HANDLE * font))))
    legend_rows = -(-len(names) // columns) if names else 0
    canvas.set_size_inches(total / 72, (rows * height + legend_rows * ROW * font) / 72)
    if names:
        handles = [_handle(entry.style, entry.line, entry.marker) for entry in figure.legend().values()]
        canvas.legend(
            handles, list(names.values()), loc="outside upper left", ncols=columns, frameon=False, fontsize=font,
            handlelength=2.3, handletextpad=0.5, columnspacing=1.0, labelspacing=ROW - 1.2, borderpad=0.1,
            borderaxespad=0.3,
        )  # fmt: skip
    drawn = []
    for i, panel in enumerate(figure.panels):
        axes = canvas.add_subplot(rows, figure.columns, i + 1)
        scales = panel.scales(6 if alone else 4)
        _axes(axes, panel, scales, font)
        for mark in panel.marks:
            if not isinstance(mark, Note):
                _draw(axes, mark, scales, 0.6 if panel.crowded else 1.0)
        drawn.append((axes, panel, scales))
    # savefig would draw twice more; the layout needs no drawing, and nothing that is added below moves it.
    ConstrainedLayoutEngine(h_pad=4 / 72, w_pad=6 / 72).execute(canvas)
    for axes, panel, scales in drawn:
        for label, room in ((axes.xaxis.label, axes.bbox.width), (axes.yaxis.label, axes.bbox.height)):
            box = label.get_window_extent()
            label.set_fontsize(font * min(1.0, (room + 12) / max(box.width, box.height)))
        _annotate(axes, [mark for mark in panel.marks if isinstance(mark, Note)], scales, font - 2)
    return canvas


def _axes(axes: Axes, panel: Panel, scales: tuple[Scale, Scale], font: float) -> None:
    for name, axis, scale in zip("xy", (panel.x, panel.y), scales, strict=True):
        getattr(axes, f"set_{name}scale")("log" if scale.log else "linear")
        getattr(axes, f"set_{name}lim")(scale.low, scale.high)
        getattr(axes, f"set_{name}ticks")(
            list(scale.ticks), labels=[_legal(text) for text in scale.ticks.values()], fontsize=font
        )
        getattr(axes, f"set_{name}label")(_legal(axis.title), fontsize=font)
    axes.minorticks_off()
    axes.patch.set_visible(False)  # the figure is white already


def _draw(axes: Axes, mark: Points | Line | Band, scales: tuple[Scale, Scale], size: float) -> None:
    colour = mark.style.colour
    if isinstance(mark, Band):
        for x, lower, upper in mark.segments(scales[1].low, scales[1].high):
            axes.fill([*x, *reversed(x)], [*upper, *reversed(lower)], facecolor=colour, alpha=0.16, linewidth=0)
        return
    places = [_place(x, y, scales) for x, y in zip(mark.x, mark.y, strict=True)]
    if isinstance(mark, Line):
        width, alpha = (1.4, 0.55) if mark.faint else (2.0, 1.0)
        xs, ys = ([math.nan if at is None else at[i] for at in places] for i in (0, 1))  # broken at NaN
        axes.plot(xs, ys, color=colour, linewidth=width, alpha=alpha, linestyle=DASHES[mark.style.dash])
    else:
        for at, lo, hi in zip(mark.x, mark.lo, mark.hi, strict=False):
            ends = [end for end in (_place(at, lo, scales), _place(at, hi, scales)) if end is not None]
            if len(ends) == 2:
                axes.plot(*zip(*ends, strict=True), color=colour, linewidth=1.4, marker="_", markersize=8)
    if isinstance(mark, Points) or mark.markers:
        faint = isinstance(mark, Points) and mark.faint
        inside = [at for at in places if at is not None and _inside(at, scales)]
        if inside:  # markers at the edge of the axes are drawn whole
            axes.plot(*zip(*inside, strict=True), clip_on=False, **_marker(mark.style, size, faint))


def _place(x: float | None, y: float | None, scales: tuple[Scale, Scale]) -> tuple[float, float] | None:
    """The point, or None where a value is not known or an axis cannot show it."""
    if x is None or y is None or not all(math.isfinite(s.at(v)) for s, v in zip(scales, (x, y), strict=True)):
        return None
    return x, y


def _inside(at: tuple[float, float], scales: tuple[Scale, Scale]) -> bool:
    return all(-1e-3 <= scale.at(value) <= 1 + 1e-3 for scale, value in zip(scales, at, strict=True))


def _marker(look: Style, size: float, faint: bool) -> dict[str, Any]:
    """Open, so that those behind it stay visible; a small one without an edge for clouds."""
    shape = {"linestyle": "", "marker": SYMBOLS[look.symbol]}
    if faint:
        return shape | {"markersize": 4.5, "markerfacecolor": (look.colour, 0.4), "markeredgewidth": 0}
    edge = {"markeredgecolor": look.colour, "markeredgewidth": 1.6 * size}
    return shape | edge | {"markersize": 9 * size, "markerfacecolor": (look.colour, 0.25)}


def _handle(look: Style, line: bool, marker: bool) -> Line2D:
    paint = _marker(look, 1.0, False) if marker else {}
    return Line2D([], [], color=look.colour, linewidth=2, **paint | {"linestyle": DASHES[look.dash] if line else ""})


def _annotate(axes: Axes, notes: list[Note], scales: tuple[Scale, Scale], size: float) -> None:
    """Notes on the side of their point with room, moved up or down where others stand already."""
    taken: list[Bbox] = []
    for note in notes:
        if _place(note.x, note.y, scales) is None or not _inside((note.x, note.y), scales):
            continue
        x, y = axes.transData.transform((note.x, note.y))
        text = _legal(note.text)
        box = _extent(axes.get_figure(), text, size)
        right = x + 8 + box.width < axes.bbox.x1
        left = x + 8 if right else x - 8 - box.width
        places = [y + step * size for step in (0, *(side * n for n in range(1, 12) for side in (-1, 1)))]
        boxes = [Bbox.from_bounds(left, at - size / 2, box.width, size) for at in places]
        free = [b for b in boxes if axes.bbox.y0 < b.y0 and b.y1 < axes.bbox.y1 and not b.count_overlaps(taken)]
        chosen = (free or boxes)[0]
        taken.append(chosen)
        offset = (8 if right else -8, (chosen.y0 + chosen.y1) / 2 - y)
        axes.annotate(
            text, (note.x, note.y), offset, textcoords="offset points", fontsize=size, va="center",
            ha="left" if right else "right",
        )  # fmt: skip


def _extent(canvas: Any, text: str, font: float) -> Bbox:
    """Size of a text in points."""
    return Text(0, 0, text, fontsize=font, figure=canvas).get_window_extent(dpi=72)


def _legal(text: str) -> str:
    return ILLEGAL.sub("\ufffd", text)


def _clean(drawn: str, title: str) -> str:
    """matplotlib's SVG with a title, fit to stand in a page: its style sheet would apply to the whole document."""
    root = ElementTree.fromstring(drawn)
    width, height = root.get("viewBox", "").split()[2:]
    root.attrib.clear()
    root.attrib |= {
        "xmlns": SVG, "viewBox": f"0 0 {width} {height}", "width": width, "height": height, "role": "img",
        "font-family": FAMILY, "stroke-linejoin": "round",
    }  # fmt: skip
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{SVG}}}")
        element.tail = None
        element.text = element.text if element.tag == "text" else None
        if (link := element.attrib.pop(f"{{{XLINK}}}href", None)) is not None:
            element.set("href", link)
        for key in {"d", "x", "y", "width", "height", "transform"}.intersection(element.keys()):
            short = DECIMALS.sub(lambda number: f"{float(number[0]):.1f}", element.get(key, ""))
            element.set(key, COMMANDS.sub(r"\1", short).strip() if key == "d" else short)
        if element.tag == "text":
            element.set("style", element.get("style", "").replace("font-family: 'DejaVu Sans'; ", ""))
            if element.get("transform", "").startswith("rotate(-0 "):
                del element.attrib["transform"]
    for part in [e for e in root if e.find("style") is not None]:
        root.remove(part)
    for group in reversed(list(root.iter("g"))):  # the innermost first
        group.attrib.pop("id", None)  # a number, the same in every figure
        if len(looks := {use.get("style", "") for use in group.findall("use")}) == 1:
            group.set("style", looks.pop())
            for use in group.findall("use"):
                del use.attrib["style"]
    _unwrap(root)
    named = ElementTree.Element("title")
    named.text = title
    root.insert(0, named)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _unwrap(element: ElementTree.Element) -> None:
    """Replace groups without attributes by what they hold."""
    held: list[ElementTree.Element] = []
    for child in element:
        _unwrap(child)
        held += list(child) if child.tag == "g" and not child.attrib else [child]
    element[:] = held
