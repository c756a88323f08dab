"""How the cases of a bench are written."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qies import presets
from qies.errors import UserError


@dataclass(frozen=True)
class Case:
    """B sequences of T tokens: the prompt of a prefill, what the cache holds when decoding starts."""

    size: str
    batch: int
    context: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """From SIZE:T or SIZE:BxT. Raises UserError."""
        found = re.fullmatch(r"([^:]+):(?:([1-9]\d*)x)?([1-9]\d*)", text)
        if found is None:
            raise UserError(f"Case '{text}' is not SIZE:T or SIZE:BxT, such as 400k:32768 or 400k:8x1024.")
        presets.parse_size(found[1])
        return cls(found[1], int(found[2] or 1), int(found[3]))

    def __str__(self) -> str:
        return f"{self.size}, batch {self.batch}, context {self.context}"


def size_and_length(case: str) -> tuple[str, int]:
    """SIZE:T -> a size and a number of tokens. Raises UserError otherwise."""
    size, _, length = case.partition(":")
    presets.parse_size(size)
    if not length.isdigit() or int(length) < 1:
        raise UserError(f"Case '{case}' is not SIZE:T, such as 400k:512.")
    return size, int(length)
