"""Colours, markers and dashes: the colours of Okabe and Ito (2008), which colour-blind readers tell apart.

Marker and dash tell the same apart without colour. Black and yellow, which vanish on a dark and on a light page,
give way to grey.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid")
KNOWN = ("transformer", "qies", "no_phase", "fixed_phase", "complex", "gpt2")


@dataclass(frozen=True)
class Style:
    """Colour "#rrggbb", and plotly's names of a marker and a dash."""

    colour: str
    symbol: str = "circle"
    dash: str = "solid"


GREY = Style(PALETTE[-1])


FIRST = Style(PALETTE[0], SYMBOLS[0], DASHES[0])


def style(i: int) -> Style:
    """The i-th style; colour, marker and dash come round after seven."""
    return Style(PALETTE[i % len(PALETTE)], SYMBOLS[i % len(SYMBOLS)], DASHES[i % len(DASHES)])


def styles(arms: Iterable[str]) -> dict[str, Style]:
    """A style per arm; the known arms keep theirs in every figure."""
    return {arm: style(i) for i, arm in enumerate(dict.fromkeys([*KNOWN, *arms]))}
