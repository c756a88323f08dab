"""What a model would cost before anything is spent, from its settings alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from qies.efficiency.flops import CONVENTION, forward_flops_per_token, training_flops_per_token
from qies.presets import count_parameters, head_groups, parse_size

TOKENS_PER_PARAMETER = 20  # Hoffmann et al., arXiv:2203.15556


def plan_model(values: Mapping[str, Any], arm: str, size: str, tokens: int | None, seq_len: int) -> dict[str, Any]:
    """Parameters, FLOPs, tokens and memory in bytes of the model that `values` (presets.settings) describe.

    Training memory is weights, gradients and optimizer state in fp32, without activations: Muon keeps one number a
    weight, AdamW two. Decoding keeps a constant state for entanglement layers (fp32) and, for attention layers,
    keys and values a token (2 bytes each).
    """
    params = count_parameters(values)
    tokens = tokens or TOKENS_PER_PARAMETER * parse_size(size)
    per_token = training_flops_per_token(values, seq_len)
    optimizer = 4 * params["non_embedding"] + 8 * (params["embedding"] + params["head"])
    kinds, inner = values["layer_types"], values["num_attention_heads"] * values["head_dim"]
    state = kinds.count("linear_attention") * 4 * sum(group.state_size for group in head_groups(values))
    taps = max(values["conv_size"] - 1, 0), max(values["attention_conv_size"] - 1, 0)
    conv = sum(
        n * t * 4 * values["hidden_size"]
        for n, t in zip((kinds.count("linear_attention"), kinds.count("full_attention")), taps, strict=True)
    )
    return {
        "arm": arm,
        "size": size,
        "shape": {k: v for k, v in values.items() if k.endswith(("_size", "_layers", "_heads", "_channels", "_dim"))},
        "params": params,
        "flops_convention": CONVENTION,
        "forward_flops_per_token": forward_flops_per_token(values, seq_len),
        "flops_per_token": per_token,
        "tokens": tokens,
        "flops": per_token * tokens,
        "memory": {
            "weights": 4 * params["total"],
            "gradients": 4 * params["total"],
            "optimizer": optimizer,
        },
        "decode": {"state_bytes": state + conv, "kv_bytes_per_token": kinds.count("full_attention") * 4 * inner},
    }


def plan_text(plan: Mapping[str, Any]) -> Table:
    """The plan as a table for the terminal."""
    table = Table(title=f"{plan['arm']} {plan['size']}", show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    for key, value in plan["shape"].items():
        table.add_row(key, f"{value:,}")
    for key, value in plan["params"].items():
        table.add_row(f"parameters: {key}", f"{value:,}")
    for key, value in plan["forward_flops_per_token"].items():
        table.add_row(f"forward FLOPs a token: {key}", f"{value:,.0f}")
    table.add_row("training FLOPs a token", f"{plan['flops_per_token']:,.0f}")
    table.add_row("tokens", f"{plan['tokens']:,}")
    table.add_row("training FLOPs", f"{plan['flops']:.3e}")
    for key, value in plan["memory"].items():
        table.add_row(f"training memory: {key}", f"{value / 2**20:,.1f} MiB")
    table.add_row("decode: entangled state", f"{plan['decode']['state_bytes'] / 2**10:,.1f} KiB")
    table.add_row("decode: keys and values", f"{plan['decode']['kv_bytes_per_token']:,} B a token")
    return table
