"""Cutting `[B, T, H, ..]` into columns of batch rows and chunks of tokens, by views alone."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Span(NamedTuple):
    """Tokens start to stop in chunks of C."""

    start: int
    stop: int
    C: int


def spans(T: int, C: int) -> list[Span]:
    """Whole chunks, then one that is as short as what is left: nothing is padded."""
    whole = T - T % C
    return [s for s in (Span(0, whole, C), Span(whole, T, T - whole)) if s.stop > s.start]


def tiled(x: Tensor, span: Span, b: int) -> Tensor:
    """`[B, T, H, ..]` over a span as a view `[columns, chunks, b, H, C, ..]`."""
    x = x[:, span.start : span.stop].unflatten(1, (-1, span.C)).unflatten(0, (-1, b))
    return x.permute(0, 2, 1, 4, 3, *range(5, x.ndim))


def grid(x: Tensor) -> list[tuple[Any, ...]]:
    """Views of every `[column][chunk]`, made at once."""
    return [column.unbind(0) for column in x.unbind(0)]
