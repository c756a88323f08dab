"""FLOPs of a model from its settings, by one stated convention for every arm. Imports no torch.

Legend: T sequence length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qies.accounting.objective import objective_flops
from qies.accounting.parameters import block_weights, hidden_matrices, layers
from qies.mixers import mixer

CONVENTION = (
    "matrix products only, 2 FLOPs a multiply-add, training = 3 x forward; output head counted, embedding look-up not; "
    "causal attention over (T+1)/2 positions; entanglement in chunk form with C=64"
)


def forward_flops_per_token(values: Mapping[str, Any], seq_len: int) -> dict[str, float]:
    """Forward FLOPs per token by group, at sequence length T; `values` as `presets.settings` gives them.

    projections: 2 for each parameter of a mixer, whatever its group. mlp, head: their products. The rest: what each
    mixer computes in addition (`MixerSpec.flops`), under its own label.
    """
    out = {"projections": 0.0, "mlp": 0.0, "head": 2.0 * values["vocab_size"] * values["hidden_size"]}
    out |= {"attention": 0.0, "entanglement": 0.0}
    for kind, times in layers(values).items():
        spec = mixer(kind)
        for name, weight in block_weights(values, kind).items():
            if name.startswith("mixer."):
                out["projections"] += 2.0 * times * weight.size
            elif weight.group == "mlp":
                out["mlp"] += 2.0 * times * weight.size
        out[spec.label] = out.get(spec.label, 0.0) + times * spec.flops(values, seq_len)
    return out


def training_flops_per_token(values: Mapping[str, Any], seq_len: int) -> float:
    """Forward and backward FLOPs per token, by `CONVENTION`, and those of the objective's terms where there are any."""
    total = 3.0 * sum(forward_flops_per_token(values, seq_len).values())
    if chosen := values.get("objective"):
        short = sum(forward_flops_per_token(values, 2 * chosen["long_context_window"]).values())
        total += objective_flops(values, seq_len, short)
    return total


def muon_flops(values: Mapping[str, Any], iterations: int = 5) -> float:
    """FLOPs of orthogonalising every hidden matrix once, which Muon does in each step regardless of the batch.

    A matrix [a, b] with a <= b takes X X^T, its square, and their product with X in each Newton-Schulz iteration:
    4 a^2 b + 2 a^3 (Jordan et al., Muon, 2024).
    """
    sides = (sorted(shape) for shape in hidden_matrices(values))
    return iterations * float(sum(4 * a * a * b + 2 * a**3 for a, b in sides))
