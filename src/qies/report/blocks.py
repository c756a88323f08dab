"""What a section of the page is made of."""

from __future__ import annotations

from dataclasses import dataclass, field

from markupsafe import Markup

from qies.plotting import Figure


@dataclass(frozen=True)
class Table:
    """Rows of ready text. `folded` hides a long one behind its caption; `words` aligns every column to the left."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    folded: bool = False
    words: bool = False
    kind: str = "table"


@dataclass(frozen=True)
class Chart:
    """A figure and the table of the same numbers under it; the figure's title is the caption."""

    figure: Figure
    table: Table
    kind: str = "chart"

    @property
    def json(self) -> Markup:
        """For a script element: no text of a record can close it (see Figure.json)."""
        return Markup(self.figure.json())

    @property
    def wide(self) -> bool:
        return len(self.figure.panels) > 1


@dataclass(frozen=True)
class Passage:
    """A prompt and how each arm goes on: (arm and size, text)."""

    prompt: str
    continuations: list[tuple[str, str]]
    kind: str = "passage"


@dataclass(frozen=True)
class Section:
    title: str
    text: list[str] = field(default_factory=list)
    blocks: list[Table | Chart | Passage] = field(default_factory=list)
