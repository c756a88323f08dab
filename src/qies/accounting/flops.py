"""FLOPs of a model from its settings alone, by one stated convention for every arm. Imports no torch.

Legend: T sequence length, D width, H heads, K = 2m key width, V value width, C chunk length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qies.presets import count_parameters, head_groups

CHUNK = 64
CONVENTION = (
    "matrix products only, 2 FLOPs a multiply-add, training = 3 x forward; output head counted, embedding look-up not; "
    "causal attention over (T+1)/2 positions; entanglement in chunk form with C=64"
)


def forward_flops_per_token(values: Mapping[str, Any], seq_len: int) -> dict[str, float]:
    """Forward FLOPs a token by group, at sequence length T; `values` as `presets.settings` gives them."""
    counts = count_parameters(values)
    kinds = values["layer_types"]
    inner = values["num_attention_heads"] * values["head_dim"]
    return {
        "projections": 2.0 * (counts["attention"] + counts["entanglement"] + counts["convolution"]),
        "mlp": 2.0 * counts["mlp"],
        "head": 2.0 * values["vocab_size"] * values["hidden_size"],
        "attention": kinds.count("full_attention") * 2.0 * inner * (seq_len + 1),
        "entanglement": kinds.count("linear_attention") * entanglement_flops(values, min(CHUNK, seq_len)),
    }


def entanglement_flops(values: Mapping[str, Any], chunk: int) -> float:
    """One layer's op, a token: key products, triangular inverse and its use, reads of and writes to the state.

    A head with r rows a token (1 real, 2 complex): 2 r^2 C K for each of k k^T and q k^T (lower halves), r^2 C V for
    each of X R and P D, r^3 C^2 / 3 for the inverse, and 2 r K V for each of k S, q S and k^T D.
    """
    total = 0.0
    for group in head_groups(values):
        r, k, v = (2 if group.mode == "complex" else 1), 2 * group.channels, group.values
        inside = 2 * r * r * chunk * k + 2 * r * r * chunk * v + r**3 * chunk**2 / 3
        total += group.heads * (inside + 3 * 2 * r * k * v)
    return total


def training_flops_per_token(values: Mapping[str, Any], seq_len: int) -> float:
    """Forward and backward, by `CONVENTION`."""
    return 3.0 * sum(forward_flops_per_token(values, seq_len).values())


def muon_flops(values: Mapping[str, Any], iterations: int = 5) -> float:
    """Of orthogonalising every hidden matrix once, as Muon does each step whatever the batch.

    A matrix [a, b] with a <= b takes X X^T, its square, and their product with X in each Newton-Schulz iteration:
    4 a^2 b + 2 a^3 (Jordan et al., Muon, 2024).
    """
    d, f, kinds = values["hidden_size"], values["intermediate_size"], values["layer_types"]
    inner = values["num_attention_heads"] * values["head_dim"]
    attention = [3 * inner, inner] if values["block"] == "gpt2" else [inner] * 4
    keys, wide = (sum(getattr(g, name) for g in head_groups(values)) for name in ("key_width", "value_width"))
    widths = len(kinds) * [f, f] + kinds.count("full_attention") * attention
    widths += kinds.count("linear_attention") * [keys, keys, wide, wide]
    sides = ((min(d, w), max(d, w)) for w in widths)
    return iterations * float(sum(4 * a * a * b + 2 * a**3 for a, b in sides))
