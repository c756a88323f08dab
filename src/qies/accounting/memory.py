"""Memory per GPU in training with FSDP2 in bfloat16, from the model's settings. Imports no torch.

Legend: B sequences of a micro-batch, T their length, D width, F MLP width, g GPUs.

Weights, gradients and optimizer state are fp32 and sharded over g GPUs (`fully_shard` on every block and on the whole:
Zhao et al., arXiv:2304.11277; ZeRO stage 3: Rajbhandari et al., arXiv:1910.02054). Activations are counted tensor by
tensor, as Korthikanti et al. (arXiv:2205.05198) do for the transformer, for this package's blocks as they run on CUDA;
mixers declare their own (`MixerSpec.activation_bytes`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qies.accounting.parameters import control_parameters, count_parameters
from qies.mixers import NotCounted, mixer, mixers
from qies.mixers.common import FULL, HALF


def training_memory(
    values: Mapping[str, Any], *, gpus: int, micro_batch: int, seq_len: int, checkpointing: bool
) -> dict[str, float]:
    """Bytes on one of `gpus` GPUs at the peak of a step, by category.

    weights 4 P / g; gradients 4 P / g; optimizer 4 P / g for Muon's matrices and 8 P / g for AdamW's parameters;
    gathered, see `gathered_bytes` (on one GPU 2 P, the copies that autocast makes); activations, see
    `activation_bytes` (absent where `obstacle` says why).
    """
    counts = count_parameters(values)
    total = counts["total"]
    adamw = total - counts["non_embedding"] + control_parameters(values)
    out = {
        "weights": FULL * total / gpus,
        "gradients": FULL * total / gpus,
        "optimizer": FULL * (total + adamw) / gpus,
        "gathered": gathered_bytes(values) if gpus > 1 else float(HALF * total),
    }
    if obstacle(values) is None:
        out["activations"] = micro_batch * seq_len * activation_bytes(values, checkpointing=checkpointing)
    return out


def gathered_bytes(values: Mapping[str, Any]) -> float:
    """What FSDP2 gathers on every GPU: bfloat16 weights of the root (embedding and head, kept from forward to
    backward) and of two blocks (the current and the prefetched one), and the gradients of the larger of root and block
    in bfloat16 and, for the reduction, in float32."""
    counts = count_parameters(values)
    root = counts["total"] - counts["non_embedding"]
    block = counts["non_embedding"] / values["num_hidden_layers"]
    return HALF * (root + 2 * block) + (HALF + FULL) * max(root, block)


def activation_bytes(values: Mapping[str, Any], *, checkpointing: bool) -> float:
    """Bytes per token kept for the backward pass, at its peak.

    Those of all blocks, the embedding and the loss; with `checkpointing` the inputs of all blocks and one block. Raises
    NotCounted, a ValueError, for a mixer whose activations are not known (`obstacle`).
    """
    blocks = [block_bytes(values, kind) for kind in values["layer_types"]]
    kept = len(blocks) * HALF * values["hidden_size"] + max(blocks) if checkpointing else sum(blocks)
    return kept + ends_bytes(values)


def obstacle(values: Mapping[str, Any]) -> str | None:
    """Why the activations of this model cannot be counted, or None."""
    try:
        for spec in mixers(values["layer_types"]):
            spec.kept_bytes(values)
    except NotCounted as reason:
        return str(reason)
    return None


def ends_bytes(values: Mapping[str, Any]) -> float:
    """Bytes per token of embedding, final norm and loss.

    The logits [vocabulary] in float32 after the cap and after the log-softmax, and the same again for their gradients.
    """
    d, vocab = values["hidden_size"], values["vocab_size"]
    norms = HALF * d if values["block"] == "gpt2" else 2 * FULL * d
    kept = FULL * vocab * (2 if values["logit_softcap"] else 1)
    return norms + HALF * d + 2 * kept


def block_bytes(values: Mapping[str, Any], kind: str) -> float:
    """Bytes per token that one block with the mixer `kind` keeps for its backward pass."""
    d, f, own = values["hidden_size"], values["intermediate_size"], mixer(kind).kept_bytes(values)
    if values["block"] == "gpt2":
        # two norms (input and output, mean and deviation); the input and output of the MLP's non-linearity
        return own + HALF * (4 * d + 2 * f) + FULL * 4
    # two norms: float32 input; their outputs; the MLP's rectifier and its square
    return own + 2 * (FULL * d + FULL) + HALF * d + HALF * 2 * f
