"""Loss on held-out text, in nats per token and bits per byte."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from qies.data.batches import val_batches
from qies.data.shards import Shards
from qies.data.tokenizer import token_byte_lengths
from qies.model import QiesForCausalLM
from qies.objective import bits_per_byte
from qies.ops.loss import linear_cross_entropy
from qies.train.distributed import Group

SHORT_CONTEXT = 64  # tokens
COMPARED = 16_384  # tokens of held-out text that are read with short contexts too


@torch.no_grad()
def held_out_loss(
    model: QiesForCausalLM,
    shards: Shards,
    *,
    seq_len: int,
    batch_size: int,
    max_tokens: int = 0,
    precision: Callable[[], AbstractContextManager],
    group: Group | None = None,
) -> dict[str, Any]:
    """Cross-entropy over the validation text in windows of `seq_len`; every token but the first is predicted once.

    The processes of `group` share each batch, and all return the result over the whole text.

    Args:
        max_tokens: Evaluate this number of tokens only; 0 for all.
        precision: The context of forward passes.

    Returns:
        val_loss (nats per token), val_bpb (bits per byte, comparable between tokenizers), val_tokens and val_bytes.
        `val_by_source` has the same for each source if there are several; a token counts for the source of its
        document, `<|endoftext|>` for that of the document it begins. `val_loss_clean`, `val_bpb_clean` and
        `val_tokens_clean` cover the clean documents (`Shards.val_clean`); they are absent if there are none or if the
        overlap was not measured.
    """
    group = group or Group()
    lengths = token_byte_lengths(shards.tokenizer())
    total = len(shards.tokens("val"))
    read = min(total, max_tokens + 1) if max_tokens else total
    starts, runs = shards.val_sources(read)
    documents, clean = shards.val_clean(read)
    names = list(dict.fromkeys(runs)) or [shards.manifest.corpus]
    source_of_run = np.array([names.index(name) for name in runs] or [0])

    def part_of(where: np.ndarray) -> np.ndarray:
        """The part of each token at these positions: 2 * source + (1 if clean else 0)."""
        source = source_of_run[np.maximum(np.searchsorted(starts, where, "right") - 1, 0)]
        return 2 * source + clean[np.searchsorted(documents, where, "right") - 1]

    parts = 2 * len(names)
    nats, tokens, size = (np.zeros(parts) for _ in range(3))
    position = 1  # of the next target in the text
    training = model.training
    model.eval()
    size[part_of(np.array(0))] += lengths[int(shards.tokens("val")[:1][0])]  # not a target, but its bytes count
    for batch in val_batches(shards, seq_len, batch_size, max_tokens=max_tokens or None):
        goals = batch[:, 1:]
        where = np.arange(position, position + goals.size).reshape(goals.shape)
        position += goals.size
        part = part_of(where)
        tokens += np.bincount(part.ravel(), minlength=parts)
        size += np.bincount(part.ravel(), lengths[goals].ravel(), minlength=parts)
        nats += _nats(model, batch, part, parts, precision, group)
    nats = group.gather(nats.tolist()).reshape(group.size, -1).sum(0).numpy()
    model.train(training)
    sums = np.stack([nats, tokens, size]).reshape(3, len(names), 2)
    result: dict[str, Any] = _measures(*sums.sum((1, 2)))
    if sums[1, :, 1].any():
        own = _measures(*sums[:, :, 1].sum(1))
        result |= {f"{key}_clean": own[key] for key in ("val_loss", "val_bpb", "val_tokens")}
    if len(names) > 1:
        each = zip(names, sums.sum(2).T, strict=True)
        result["val_by_source"] = {name: _measures(*of_source) for name, of_source in each if of_source[2] > 0}
    return result


@torch.no_grad()
def long_short_difference(
    model: QiesForCausalLM,
    shards: Shards,
    *,
    seq_len: int,
    batch_size: int,
    max_tokens: int = 0,
    precision: Callable[[], AbstractContextManager],
) -> float | None:
    """What the model gains from distant content: its mean loss after short contexts minus that after the whole window,
    in nats per token of held-out text. None where no window is long enough.

    A short context holds n to 2n - 1 tokens, n = min(64, seq_len / 4); compared are the tokens of each window from the
    2n-th on, of the first 16,384 (or `max_tokens`, if fewer; 0 is no limit). The mean of the differences by which
    LongPPL chooses its tokens (Fang et al., arXiv:2410.23771).
    """
    window = min(SHORT_CONTEXT, seq_len // 4)
    if window < 1:
        return None
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in val_batches(shards, seq_len, batch_size, max_tokens=min(max_tokens or COMPARED, COMPARED)):
        ids = torch.from_numpy(batch).to(model.device)
        inputs, goals = ids[:, :-1], ids[:, 1:]
        if inputs.shape[1] <= 2 * window:
            continue
        with precision():
            hidden = model.model(inputs, use_cache=False).last_hidden_state
            long = model.token_losses(hidden[:, 2 * window :], goals[:, 2 * window :])
            short = model.short_context_losses(goals, window, inputs)
        total += (short.double() - long.double()).sum().item()
        count += long.numel()
    model.train(training)
    return total / count if count else None


def _measures(nats: float, tokens: float, size: float) -> dict[str, float]:
    return {
        "val_loss": float(nats / tokens),
        "val_bpb": bits_per_byte(float(nats), int(size)),
        "val_tokens": int(tokens),
        "val_bytes": int(size),
    }


def _nats(
    model: QiesForCausalLM,
    batch: np.ndarray,
    part: np.ndarray,
    parts: int,
    precision: Callable[[], AbstractContextManager],
    group: Group,
) -> np.ndarray:
    """This process's share of a batch's cross-entropy, in nats, float64 `[parts]`; `part` is `[B, T]`."""
    own = slice(group.rank, None, group.size)
    idle = len(batch) <= group.rank  # a process without a row takes part in the collectives only
    ids = torch.from_numpy(batch[:1] if idle else batch[own]).to(group.device)
    inputs, goal = ids[:, :-1], torch.full_like(ids[:, 1:], -100) if idle else ids[:, 1:]
    mine = part[:1] if idle else part[own]
    nats = np.zeros(parts)
    with precision():
        if group.size == 1:  # the sum in fp64
            hidden = model.model(inputs, use_cache=False).last_hidden_state
            losses = linear_cross_entropy(
                hidden.flatten(0, 1),
                model.lm_head.weight,
                goal.flatten(),
                softcap=model.config.logit_softcap or None,
                reduction="none",
            )
            return np.bincount(mine.ravel(), losses.double().cpu().numpy(), minlength=parts)
        for number in np.unique(part):  # sharded weights are gathered in the model's forward only
            in_part = torch.from_numpy(mine == number).to(group.device)
            only = torch.where(in_part, goal, -100)
            out = model(inputs, shift_labels=only, num_items_in_batch=1, logits_to_keep=1, use_cache=False)
            nats[number] = out.loss.item()
    return nats
