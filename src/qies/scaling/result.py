"""The protocol of every result of this package: plain JSON, a summary, and figures."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from qies.plotting import Figure


class Result(ABC):
    """A frozen dataclass that a fit or a comparison returns; fields that begin with an underscore are internal."""

    def to_dict(self) -> dict[str, Any]:
        """The public fields as plain JSON values; an unknown or non-finite number is None."""
        return public_fields(self)

    @abstractmethod
    def summary(self) -> str:
        """The result, what it rests on, and every warning, as one paragraph."""

    @abstractmethod
    def figures(self) -> dict[str, Figure]:
        """Every figure that the result has numbers for, by a name for its file."""


def public_fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass as plain JSON values, without those that begin with an underscore."""
    return {f.name: plain(getattr(value, f.name)) for f in fields(value) if not f.name.startswith("_")}


def plain(value: Any) -> Any:
    """A value of JSON: dataclasses and arrays become dicts and lists, a number that is not finite None."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if is_dataclass(value):
        return public_fields(value)
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def paragraph(parts: Iterable[str], warnings: Iterable[str] = ()) -> str:
    """Sentences from clauses: the parts as they are, warnings with a capital."""
    return ". ".join([*parts, *(w[0].upper() + w[1:] for w in warnings)]) + "."
