"""Progress reports of long computations on data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """Progress of the phase `what`: `done` of `total` (0: unknown), and the documents and tokens done so far."""

    what: str
    done: int = 0
    total: int = 0
    documents: int = 0
    tokens: int = 0


Progress = Callable[[Step], None]
