"""What a long piece of work on data tells of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """How far it is: `done` of `total` (0: unknown), and the documents and tokens done in all."""

    what: str
    done: int = 0
    total: int = 0
    documents: int = 0
    tokens: int = 0


Progress = Callable[[Step], None]
