"""What every source yields: batches of documents, each with the position from which reading resumes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from qies.data.manifest import Dropped, Reading


@dataclass(frozen=True)
class Document:
    """One text. `id` is unique within its `source` and names no machine."""

    text: str
    source: str
    id: str

    @property
    def label(self) -> str:
        """Its name in error messages."""
        return f"the document '{self.id}' of '{self.source}'"


@dataclass(frozen=True)
class DocumentBatch:
    """Consecutive documents, their `split` ("" if a hash of the text decides), and the position (JSON) after them."""

    documents: list[Document]
    split: str
    position: Any
    empty_file: bool = False
    """Whether the batch stands for a file without records."""


class DocumentStream(Protocol):
    """Documents of one or more sources, read in a fixed order."""

    name: str

    @property
    def size(self) -> int:
        """Approximate size in bytes, 0 if unknown."""

    @property
    def distinct(self) -> bool:
        """Whether the stream has already dropped repeated documents."""

    def fingerprint(self) -> str:
        """What identifies the text without reading all of it."""

    def about(self, source: str) -> tuple[str, str]:
        """Licence and version of a source."""

    def reading(self, dropped: Dropped) -> Reading:
        """What was read and skipped, with what the build `dropped` from the batches."""

    def digests(self) -> dict[str, str] | None:
        """sha256 of the whole corpus (key "") and of each source; None if they are known only after reading."""

    def batches(self, position: Any, characters: int) -> Iterator[DocumentBatch]:
        """Batches of about `characters` from `position` on (None: from the start)."""

    def sample(self, characters: int) -> Iterator[Document]:
        """About `characters` of training text."""
