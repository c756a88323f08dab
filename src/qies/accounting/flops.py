"""FLOPs of a model from its settings, by one stated convention for every arm. Imports no torch.

Legend: T sequence length, or tokens in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from qies.accounting.objective import objective_flops
from qies.accounting.parameters import block_weights, hidden_matrices, layers
from qies.mixers import MixerSpec, mixer
from qies.mixers.entanglement import CHUNK

CONVENTION = (
    "matrix products only, 2 FLOPs a multiply-add, training = 3 x forward; output head counted, embedding look-up not; "
    "causal attention over (T+1)/2 positions; entanglement in chunk form with C=64"
)

Values = Mapping[str, Any]


def forward_flops_per_token(values: Values, seq_len: int) -> dict[str, float]:
    """Forward FLOPs per token by module, the mean over a sequence of T tokens; `values` as `presets.settings` gives
    them.

    projections: 2 for each parameter of a mixer outside its convolution. convolution: 2 for each tap. mlp, head: their
    products. The rest: what each mixer computes in addition (`MixerSpec.flops`), under its own label.
    """
    return _by_module(values, lambda spec: spec.flops(values, seq_len))


def prefill_flops(values: Values, seq_len: int) -> dict[str, float]:
    """FLOPs of reading a prompt of T tokens, by module: T forward passes, but the head for the last token alone."""
    each = forward_flops_per_token(values, seq_len)
    return {name: flops * (1 if name == "head" else seq_len) for name, flops in each.items()}


def decode_flops(values: Values, context: int) -> dict[str, float]:
    """FLOPs of one token after T cached ones, by module: attention over T + 1 positions, entanglement by its
    recurrence."""
    return _by_module(values, lambda spec: spec.decode_flops(values, context))


def training_flops_per_token(values: Values, seq_len: int) -> float:
    """Forward and backward FLOPs per token, by `CONVENTION`, and those of the objective's terms where there are any."""
    total = 3.0 * sum(forward_flops_per_token(values, seq_len).values())
    if chosen := values.get("objective"):
        short = sum(forward_flops_per_token(values, 2 * chosen["long_context_window"]).values())
        total += objective_flops(values, seq_len, short)
    return total


def decode_flops_per_token(values: Values, context: int) -> float:
    """The sum of `decode_flops`."""
    return sum(decode_flops(values, context).values())


def cheaper_from(
    values: Values, rival: Values, cost: Callable[[Values, int], float] = decode_flops_per_token
) -> int | None:
    """The smallest T from which on a token of the model `values` costs no more FLOPs than one of `rival`; None where
    there is none.

    cost: `decode_flops_per_token` or `training_flops_per_token`. From a chunk on, both are affine in T for the built-in
    mixers, so that the difference is a straight line, whose root is the answer; below, every T is tried.
    """

    def excess(length: int) -> float:
        return cost(values, length) - cost(rival, length)

    first, slope = excess(CHUNK), excess(CHUNK + 1) - excess(CHUNK)
    if slope > 0 or (first > 0 and slope == 0):
        return None
    if first > 0:
        return CHUNK + math.ceil(first / -slope)
    return next((t + 1 for t in range(CHUNK - 1, 0, -1) if excess(t) > 0), 1)


def muon_flops(values: Values, iterations: int = 5) -> float:
    """FLOPs of orthogonalising every hidden matrix once, which Muon does in each step regardless of the batch.

    A matrix [a, b] with a <= b takes X X^T, its square, and their product with X in each Newton-Schulz iteration:
    4 a^2 b + 2 a^3 (Jordan et al., Muon, 2024).
    """
    sides = (sorted(shape) for shape in hidden_matrices(values))
    return iterations * float(sum(4 * a * a * b + 2 * a**3 for a, b in sides))


def _by_module(values: Values, op: Callable[[MixerSpec], float]) -> dict[str, float]:
    """FLOPs of one token by module; `op` gives those of one mixer beyond its weights."""
    out = {"projections": 0.0, "convolution": 0.0, "attention": 0.0, "entanglement": 0.0, "mlp": 0.0}
    out["head"] = 2.0 * values["vocab_size"] * values["hidden_size"]
    for kind, times in layers(values).items():
        spec = mixer(kind)
        for name, weight in block_weights(values, kind).items():
            if name.startswith("mixer."):
                module = "convolution" if weight.group == "convolution" else "projections"
                out[module] += 2.0 * times * weight.size
            elif weight.group == "mlp":
                out["mlp"] += 2.0 * times * weight.size
        out[spec.label] = out.get(spec.label, 0.0) + times * op(spec)
    return out
