"""What the built-in mixers share: the output gate, bytes of tensors, and checks of fields. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from qies.errors import unknown
from qies.mixers.spec import Values, Weight

HALF, FULL = 2, 4  # bytes of bfloat16 and float32


def gate_width(values: Values, heads: int, wide: int) -> int:
    """Outputs of the gate's projection, for `heads` heads of `wide` channels in all."""
    return {"none": 0, "head": heads, "channel": wide}[values["gate"]]


def gate_weights(values: Values, heads: int, wide: int) -> dict[str, Weight]:
    """The gate's projection, if there is one."""
    width = gate_width(values, heads, wide)
    return {"gate.proj.weight": Weight((width, values["hidden_size"]), "vector")} if width else {}


def gate_bytes(values: Values, heads: int, wide: int) -> float:
    """Bytes per token: the mixer's output in float32, normalised, and gated (the input of the last projection); the
    gate itself."""
    gate = gate_width(values, heads, wide)
    gated = HALF * wide if gate else 0
    return FULL * (wide + heads) + HALF * wide + gated + 2 * HALF * gate


def conv_weights(channels: int, taps: int) -> dict[str, Weight]:
    """The short convolution, if it has taps."""
    return {"conv.weight": Weight((channels, taps), "vector", "convolution")} if taps else {}


def unknown_choice(values: Values, choices: Mapping[str, Collection[str]]) -> str | None:
    """The first field whose value is none of its choices, in one sentence."""
    for name, options in choices.items():
        if values[name] not in options:
            return str(unknown("value", values[name], options, where=f"for model.{name}"))
    return None


def below(values: Values, least: Mapping[str, int]) -> str | None:
    """The first field below its least value, in one sentence."""
    for name, smallest in least.items():
        if values[name] < smallest:
            return f"model.{name} is {values[name]}; it must be at least {smallest}."
    return None


def outside(values: Values, *, fractions: Collection[str] = (), positive: Collection[str] = ()) -> str | None:
    """The first field that is no fraction, or not positive, in one sentence."""
    for name in fractions:
        if not 0 <= values[name] <= 1:
            return f"model.{name} is {values[name]}; it must lie in [0, 1]."
    for name in positive:
        if not values[name] > 0:
            return f"model.{name} is {values[name]}; it must be positive."
    return None


def first_problem(*problems: Any) -> str | None:
    """The first problem that there is."""
    return next((problem for problem in problems if problem), None)
