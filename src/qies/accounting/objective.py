"""Parameters and FLOPs of the objective's auxiliary terms, computed from the settings. Imports no torch.

The heads are used in training only. They form the group `objective` of their own: part of `total`, as they are trained
and stored, but not of `non_embedding`, the N of every comparison, as the model that is evaluated does not use them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qies.mixers import Weight
from qies.mixers.entanglement import ENTANGLEMENT, head_groups

GROUP = "objective"


def state_layers(values: Mapping[str, Any]) -> int:
    """Layers whose states and read-outs the terms see."""
    return list(values["layer_types"]).count(ENTANGLEMENT.name)


def readout_width(values: Mapping[str, Any]) -> int:
    """Numbers per token that the far-future head reads: the read-outs of all entanglement layers, else the last hidden
    state."""
    return state_layers(values) * sum(g.read_width for g in head_groups(values)) or values["hidden_size"]


def objective_weights(values: Mapping[str, Any]) -> dict[str, Weight]:
    """The parameters of the terms' heads, by name in `QiesForCausalLM`; none for cross-entropy alone."""
    chosen, d = values.get("objective") or {}, values["hidden_size"]
    out = {}
    if chosen.get("far_future"):
        rank = chosen["far_future_rank"]
        out["objective.far_future.down.weight"] = Weight((rank, readout_width(values)), group=GROUP)
        out["objective.far_future.up.weight"] = Weight((d, rank), group=GROUP)
    if chosen.get("multi_token"):
        for ahead in range(chosen["multi_token_ahead"]):
            out[f"objective.multi_token.maps.{ahead}.weight"] = Weight((d, d), group=GROUP)
    return out


def objective_flops(values: Mapping[str, Any], seq_len: int, short_forward: float) -> float:
    """Training FLOPs per token of the terms, averaged over a run: they are computed until their weights reach zero.

    `short_forward`: the forward FLOPs per token in segments of two short contexts, in which LongCE reads every token
    twice, without a backward pass. A term's own products count three times, as the model's do; so do the logits that
    LongCE computes again for each token. Renyi-2 entropies: four real Gram products of each state. Upper bounds: at the
    ends of a row fewer bags and segments exist, and of a segment only the second half is scored.
    """
    chosen = values.get("objective") or {}
    d, vocab = values["hidden_size"], values["vocab_size"]
    total = 0.0
    if chosen.get("far_future"):
        head = chosen["far_future_rank"] * (readout_width(values) + d) + d * vocab
        total += 3 * 2 * head / chosen["far_future_stride"]
    if chosen.get("multi_token"):
        total += 3 * 2 * chosen["multi_token_ahead"] * (d * d + d * vocab)
    if chosen.get("long_context"):
        total += 2 * short_forward + 3 * 2 * d * vocab
    if chosen.get("entropy_floor"):
        chunk = min(chosen["entropy_floor_chunk"], seq_len)
        shapes = [(g.heads, g.channels, g.values) for g in head_groups(values)] * state_layers(values)
        shapes = shapes or [(values["num_attention_heads"], chunk, d // values["num_attention_heads"])]
        total += 3 * sum(8 * heads * min(m, v) ** 2 * max(m, v) for heads, m, v in shapes) / chunk
    return total * chosen["until"] if total else 0.0
