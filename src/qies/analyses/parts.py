"""The parts of a section of the page."""

from __future__ import annotations

from dataclasses import dataclass, field

from markupsafe import Markup

from qies.plotting import Figure


@dataclass(frozen=True)
class Table:
    """Rows of formatted text. `folded` hides the table behind its caption; `words` aligns every column to the left."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    folded: bool = False
    words: bool = False
    kind: str = "table"


@dataclass(frozen=True)
class Chart:
    """A figure and a table of the same numbers; the figure's title is the caption."""

    figure: Figure
    table: Table
    kind: str = "chart"

    @property
    def json(self) -> Markup:
        """For a script element, escaped so that no text of a record can close it (see Figure.json)."""
        return Markup(self.figure.json())

    @property
    def svg(self) -> Markup:
        """The static figure, for print and for browsers without scripts; inline, it needs no XML name space."""
        return Markup(self.figure.svg().replace(' xmlns="http://www.w3.org/2000/svg"', "", 1))

    @property
    def wide(self) -> bool:
        return len(self.figure.panels) > 1


@dataclass(frozen=True)
class Passage:
    """A prompt and each arm's continuation: (arm and size, text)."""

    prompt: str
    continuations: list[tuple[str, str]]
    kind: str = "passage"


@dataclass(frozen=True)
class Section:
    title: str
    text: list[str] = field(default_factory=list)
    blocks: list[Table | Chart | Passage] = field(default_factory=list)
