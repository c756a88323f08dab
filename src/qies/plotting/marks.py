"""The parts of a figure, as frozen data: axes with units, and the marks between them.

A mark with a `name` has an entry in the legend; marks of one name share it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qies.plotting.axes import Scale, make_scale
from qies.plotting.style import FIRST, Style

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
    """A line through (x, y), broken at None; `faint` where it is extrapolated; `markers` at its points."""

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
