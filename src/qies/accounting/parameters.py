"""Every parameter of a model from its settings: shapes, counts by group, optimizers. Imports no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from qies.accounting.objective import GROUP as OBJECTIVE
from qies.accounting.objective import objective_weights
from qies.mixers import Weight, mixer

GROUPS = ("embedding", "head", "attention", "entanglement", "convolution", "mlp", "norm")  # present in every count


def outer_weights(values: Mapping[str, Any]) -> dict[str, Weight]:
    """Those outside the blocks, by name in `QiesForCausalLM`. A tied embedding is trained as the head that it is."""
    vocab, d, tied = values["vocab_size"], values["hidden_size"], values["tie_word_embeddings"]
    table = "head" if tied else "embedding"
    out = {"model.embed_tokens.weight": Weight((vocab, d), table, "embedding")}
    if values["block"] == "gpt2":
        out["model.embed_positions.weight"] = Weight((values["max_position_embeddings"], d), table, "embedding")
        out |= _layer_norm("model.norm", d)
    if not tied:
        out["lm_head.weight"] = Weight((vocab, d), "head", "head")
    return out | objective_weights(values)


def block_weights(values: Mapping[str, Any], kind: str) -> dict[str, Weight]:
    """Those of one block with the mixer `kind`, by name in the block. Raises UserError for an unknown mixer."""
    d, hidden = values["hidden_size"], values["intermediate_size"]
    mixing = {f"mixer.{name}": weight for name, weight in mixer(kind).declared(values).items()}
    up, down = Weight((hidden, d), group="mlp"), Weight((d, hidden), group="mlp")
    if values["block"] != "gpt2":
        return mixing | {"mlp.up_proj.weight": up, "mlp.down_proj.weight": down}
    return {
        **mixing,
        **_layer_norm("mixer_norm", d),
        **_layer_norm("mlp_norm", d),
        "up_proj.weight": up,
        "up_proj.bias": Weight((hidden,), "vector", "mlp"),
        "down_proj.weight": down,
        "down_proj.bias": Weight((d,), "vector", "mlp"),
    }


def _layer_norm(name: str, width: int) -> dict[str, Weight]:
    return {f"{name}.{part}": Weight((width,), "vector", "norm") for part in ("weight", "bias")}


def model_weights(values: Mapping[str, Any]) -> dict[str, Weight]:
    """Every parameter by its name in `QiesForCausalLM`."""
    blocks = {kind: block_weights(values, kind) for kind in set(values["layer_types"])}
    inner = {
        f"model.layers.{i}.{name}": weight
        for i, kind in enumerate(values["layer_types"])
        for name, weight in blocks[kind].items()
    }
    return outer_weights(values) | inner


def layers(values: Mapping[str, Any]) -> Counter[str]:
    """How many layers each mixer has."""
    return Counter(values["layer_types"])


def longest_context(values: Mapping[str, Any]) -> float:
    """How many tokens a model with learned positions takes; infinity for every other."""
    return values["max_position_embeddings"] if values["position"] == "learned" else math.inf


def count_parameters(values: Mapping[str, Any]) -> dict[str, int]:
    """Parameters by group of the model that `values` describe, in closed form.

    Groups: embedding (with learned positions), head, attention, entanglement, convolution, mlp, norm, and those of
    mixers from outside the package; `objective` where the objective has heads, which are used in training only; with
    the sums non_embedding (all but embedding, head and objective) and total.
    """
    groups = dict.fromkeys(GROUPS, 0)
    for weight, times in _with_multiplicity(values):
        groups[weight.group] = groups.get(weight.group, 0) + times * weight.size
    total = sum(groups.values())
    apart = sum(groups.get(name, 0) for name in ("embedding", "head", OBJECTIVE))
    return groups | {"non_embedding": total - apart, "total": total}


def control_parameters(values: Mapping[str, Any]) -> int:
    """Of the non-embedding parameters those that AdamW trains: biases, scales, convolutions, small control maps.

    Muon trains the rest of them; AdamW the embedding and the head too (`train.optim.parameter_groups`).
    """
    return sum(times * w.size for w, times in _with_multiplicity(values) if w.optimizer == "vector")


def hidden_matrices(values: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """The shapes of the matrices that Muon trains."""
    return [w.shape for w, times in _with_multiplicity(values) if w.optimizer == "matrix" for _ in range(times)]


def _with_multiplicity(values: Mapping[str, Any]) -> Iterable[tuple[Weight, int]]:
    """The parameters outside the blocks once, and those of each kind of block as often as it occurs."""
    yield from ((weight, 1) for weight in outer_weights(values).values())
    for kind, times in layers(values).items():
        yield from ((weight, times) for weight in block_weights(values, kind).values())
