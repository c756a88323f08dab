"""Colours, markers and dashes: a palette after Okabe and Ito (2008), for readers with and without colour vision.

Orange and sky blue are darker than in the original, and purple and brown replace black and yellow, so that every
colour has a contrast of at least 3:1 on the light and on the dark page. Marker and dash carry the same distinction.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#C98500", "#3D97D3", "#8A6BD1", "#A65628", "#7A8B00")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
KNOWN = (
    "transformer", "qies", "no_phase", "fixed_phase", "complex", "gpt2", "real_registers", "selective_phase",
    "unitary",
)  # fmt: skip


@dataclass(frozen=True)
class Style:
    """Colour "#rrggbb", and plotly's names of a marker and a dash."""

    colour: str
    symbol: str = "circle"
    dash: str = "solid"


GREY = Style("#8C8C8C")  # of reference lines, which are no arm's
FIRST = Style(PALETTE[0], SYMBOLS[0], DASHES[0])


def style(i: int) -> Style:
    """The i-th style; colours repeat after nine, markers after seven, dashes after six."""
    return Style(PALETTE[i % len(PALETTE)], SYMBOLS[i % len(SYMBOLS)], DASHES[i % len(DASHES)])


def styles(arms: Iterable[str]) -> dict[str, Style]:
    """A style per arm; the known arms keep theirs in every figure."""
    return {arm: style(i) for i, arm in enumerate(dict.fromkeys([*KNOWN, *arms]))}
