"""Causal attention with normalised queries and keys, as a mixer; and GPT-2's own. Imports no torch.

Legend: D width, H heads, K key width of a head, T sequence length.
"""

from __future__ import annotations

from qies.mixers.common import (
    FULL,
    HALF,
    below,
    conv_weights,
    first_problem,
    gate_bytes,
    gate_weights,
    outside,
    unknown_choice,
)
from qies.mixers.spec import MixerSpec, Values, Weight


def _inner(values: Values) -> int:
    return values["num_attention_heads"] * values["head_dim"]


def conv_width(values: Values) -> int:
    """Channels of the short convolution: the layer's input's, or those of the keys of all heads."""
    return _inner(values) if values["attention_conv"] == "keys" else values["hidden_size"]


def weights(values: Values) -> dict[str, Weight]:
    d, inner = values["hidden_size"], _inner(values)
    if values["block"] == "gpt2":
        return {
            "qkv_proj.weight": Weight((3 * inner, d)),
            "qkv_proj.bias": Weight((3 * inner,), "vector"),
            "o_proj.weight": Weight((d, inner)),
            "o_proj.bias": Weight((d,), "vector"),
        }
    return {
        **conv_weights(conv_width(values), values["attention_conv_size"]),
        **{f"{name}_proj.weight": Weight((inner, d)) for name in "qkv"},
        "q_scale": Weight((values["head_dim"],), "vector"),
        **gate_weights(values, values["num_attention_heads"], inner),
        "o_proj.weight": Weight((d, inner)),
    }


def flops(values: Values, seq_len: int) -> float:
    """Scores and their use: 2 FLOPs for each of two products of K per head, over (T+1)/2 positions."""
    return 2.0 * _inner(values) * (seq_len + 1)


def conv_inputs(values: Values) -> int:
    if values["block"] == "gpt2":
        return 0
    return max(values["attention_conv_size"] - 1, 0) * conv_width(values)


def activation_bytes(values: Values) -> float:
    """With a flash kernel: input; q and k before, after and as scaled or rotated; v; o; gate."""
    d, heads, inner = values["hidden_size"], values["num_attention_heads"], _inner(values)
    if values["block"] == "gpt2":
        return HALF * 4 * inner + FULL * heads  # q, k, v and o
    rotated = 2 if values["position"] == "rope" else 0
    convolved = HALF * conv_width(values) if values["attention_conv_size"] else 0
    mixing = inner * (2 * FULL + HALF * (4 + rotated)) + FULL * 3 * heads
    return HALF * d + convolved + mixing + gate_bytes(values, heads, inner)


def check(values: Values) -> str | None:
    return first_problem(
        unknown_choice(values, {"position": ("rope", "learned", "none"), "attention_conv": ("input", "keys")}),
        below(values, {"attention_conv_size": 0, "nope_interval": 0}),
        outside(values, fractions=["rope_fraction"], positive=["rope_theta"]),
    )


ATTENTION = MixerSpec(
    name="full_attention",
    module="qies.model.attention:Attention",
    weights=weights,
    flops=flops,
    group="attention",
    fields={
        "position": "rope",
        "rope_theta": 1e6,
        "rope_fraction": 1.0,
        "nope_interval": 0,
        "attention_conv_size": 4,
        "attention_conv": "keys",
    },
    check=check,
    conv_inputs=conv_inputs,
    cached=lambda values: 2 * _inner(values),
    cache="qies.model.cache:AttentionStateLayer",
    layer_type="full_attention",
    activation_bytes=activation_bytes,
)
