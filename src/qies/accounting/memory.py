"""Bytes that one GPU holds while it trains a model under FSDP2 in bfloat16, from the model's settings. No torch.

Legend: B sequences of a micro-batch, T their length, D width, F MLP width, H heads, K key width, m = K / 2, V values,
r phase rank, g GPUs.

Weights, gradients and optimizer are fp32 and cut into g parts (`fully_shard` on every block and on the whole: Zhao et
al., arXiv:2304.11277; ZeRO stage 3: Rajbhandari et al., arXiv:1910.02054). Activations are counted tensor by tensor, as
Korthikanti et al. (arXiv:2205.05198) do for the transformer, for this package's blocks as they run on CUDA.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qies.presets import HeadGroup, attention_conv_width, control_parameters, count_parameters, head_groups

HALF, FULL = 2, 4  # bytes of bfloat16 and float32
KERNEL_CHUNK = 64  # tokens of a chunk in flash-linear-attention, whose inverse [64, 64] it keeps in bfloat16
ROWS = 64  # key rows of a chunk in `ops/entangle/chunk.py`, two a token in complex mode


def training_memory(
    values: Mapping[str, Any], *, gpus: int, micro_batch: int, seq_len: int, checkpointing: bool
) -> dict[str, float]:
    """Bytes on one of `gpus` GPUs at the peak of a step, by what they hold.

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
    """What FSDP2 makes whole on every GPU: bfloat16 weights of the root (embedding and head, kept from forward to
    backward) and of two blocks (the one at work and the one fetched ahead), and the gradients of the larger of root and
    block in bfloat16 and, to be reduced, in float32."""
    counts = count_parameters(values)
    root = counts["total"] - counts["non_embedding"]
    block = counts["non_embedding"] / values["num_hidden_layers"]
    return HALF * (root + 2 * block) + (HALF + FULL) * max(root, block)


def activation_bytes(values: Mapping[str, Any], *, checkpointing: bool) -> float:
    """Bytes a token kept for the backward pass, at its peak.

    Every block's, and embedding and loss. With `checkpointing` the input of every block and one block's own. Raises
    ValueError for a model with heads that no CUDA kernel computes (`obstacle`).
    """
    if (reason := obstacle(values)) is not None:
        raise ValueError(reason)
    blocks = [block_bytes(values, kind) for kind in values["layer_types"]]
    kept = len(blocks) * HALF * values["hidden_size"] + max(blocks) if checkpointing else sum(blocks)
    return kept + ends_bytes(values)


def obstacle(values: Mapping[str, Any]) -> str | None:
    """Why the activations of this model are not known, or None."""
    groups = head_groups(values) if "linear_attention" in values["layer_types"] else ()
    if any(g.mode == "complex" and g.eigenvalues != "disc" for g in groups):
        return 'activations of complex heads are counted for model.eigenvalues="disc"; others have no count yet'
    return None


def ends_bytes(values: Mapping[str, Any]) -> float:
    """A token's share of embedding, final norm and loss.

    The logits [vocabulary] in float32 after the cap and after the log-softmax; as many again for their gradients.
    """
    d, vocab = values["hidden_size"], values["vocab_size"]
    norms = HALF * d if values["block"] == "gpt2" else 2 * FULL * d
    kept = FULL * vocab * (2 if values["logit_softcap"] else 1)
    return norms + HALF * d + 2 * kept


def block_bytes(values: Mapping[str, Any], kind: str) -> float:
    """Bytes a token that one block of `kind` keeps for its backward pass."""
    d, f = values["hidden_size"], values["intermediate_size"]
    if values["block"] == "gpt2":
        inner = values["num_attention_heads"] * values["head_dim"]
        # two norms (input and output), q, k, v and o; what enters the MLP's non-linearity and what leaves it
        return HALF * (4 * d + 4 * inner + 2 * f) + FULL * (4 + values["num_attention_heads"])
    # two norms: float32 input; what they give; the MLP's rectifier and its square
    shared = 2 * (FULL * d + FULL) + HALF * d + HALF * 2 * f
    return shared + (attention_bytes(values) if kind == "full_attention" else entanglement_bytes(values))


def attention_bytes(values: Mapping[str, Any]) -> float:
    """An attention mixer's, with a flash kernel: input; q and k before, after and as scaled or turned; v; o; gate."""
    d, heads = values["hidden_size"], values["num_attention_heads"]
    inner = heads * values["head_dim"]
    turned = 2 if values["position"] == "rope" else 0
    convolved = HALF * attention_conv_width(values) if values["attention_conv_size"] else 0
    mixing = inner * (2 * FULL + HALF * (4 + turned)) + FULL * 3 * heads
    return HALF * d + convolved + mixing + gate_bytes(values, heads, inner)


def entanglement_bytes(values: Mapping[str, Any]) -> float:
    """An entanglement mixer's: what its groups of heads share, and each group's op."""
    d, groups = values["hidden_size"], head_groups(values)
    heads, wide = sum(g.heads for g in groups), sum(g.value_width for g in groups)
    total = float(HALF * d * (2 if values["conv_size"] else 1))
    if values["phase"] == "selective" and any(g.phases for g in groups):
        total += HALF * values["phase_rank"]
    total += sum(chunk_bytes(values, g) if g.eigenvalues == "disc" else kernel_bytes(values, g) for g in groups)
    return total + gate_bytes(values, heads, wide)


def kernel_bytes(values: Mapping[str, Any], group: HeadGroup) -> float:
    """Real heads', by a kernel of flash-linear-attention: the gated delta rule, or KDA with a decay per channel.

    Around the kernel: q and k in float32 before and after they are turned, and their angles. The gated delta rule keeps
    its inputs and the inverse of every chunk, [64] numbers a token and head; the states before them it makes again.
    KDA keeps the products of queries and keys as well, and K decays and their running sum.
    """
    keys, wide, channels = group.key_width, group.value_width, values["decay"] == "channel"
    total = 2 * FULL * keys + HALF * (2 * keys + wide) + HALF * KERNEL_CHUNK * group.heads * (2 if channels else 1)
    total += FULL * group.heads * 7  # beta, decay and their maps, and the lengths of q and k
    if channels:
        total += FULL * (3 * (group.decays - group.heads) + 2 * keys)
    return total + angle_bytes(values, group, FULL * group.key_width * 2)


def chunk_bytes(values: Mapping[str, Any], group: HeadGroup) -> float:
    """Complex heads' with eigenvalues in the disc, for which no kernel exists: `ops/entangle/chunk.py`, in float32.

    A token has two rows of keys, queries and writes and two of values. Kept are: queries, keys and writes before and
    after they are rescaled, the keys once more for beta and beta's 2 x 2 matrix; in every chunk the two triangles
    [rows, rows] and what the substitution gives, the values written, and three states [K, V].
    """
    k, v, rows = 2 * group.channels, group.values, 2
    tokens = ROWS // rows
    decays = k if values["decay"] == "channel" else 1
    each = 7 * rows * k + rows * rows + 2 * rows * ROWS + rows * (v + k) + rows * v + 3 * k * v / tokens
    each += 2 * k + 2 + 3 * decays  # q and k as they came and their lengths; the rescaling
    maps = 8 * group.heads + 3 * group.decays  # from the projection to beta in the disc, and to the decay
    return FULL * (group.heads * each + maps) + angle_bytes(values, group, FULL * group.key_width * 2)


def angle_bytes(values: Mapping[str, Any], group: HeadGroup, turned: float) -> float:
    """The phases': `turned`, q and k of unit length, before they are turned; the angles; their running sum, and for q
    and k its negative, cosine and sine."""
    if values["phase"] == "none" or not group.phases:
        return 0.0
    return turned + FULL * group.heads * group.channels * (7 + (values["phase"] == "selective"))


def gate_bytes(values: Mapping[str, Any], heads: int, wide: int) -> float:
    """The mixer's output in float32, normalised, and gated (what the last projection reads); the gate itself."""
    gate = {"none": 0, "head": heads, "channel": wide}[values["gate"]]
    gated = HALF * wide if gate else 0
    return FULL * (wide + heads) + HALF * wide + gated + 2 * HALF * gate
