"""Loss on held-out text, in nats a token and bits a byte."""

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
from qies.train.parallel import Group


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
    """Cross-entropy over the validation text, every token predicted once (but the first), in windows of `seq_len`.

    Returns val_loss (nats a token), val_bpb (bits a byte of the same text, whatever the tokenizer), val_tokens and
    val_bytes, and, where the text has several sources, `val_by_source` with the same of each. A token counts for the
    source of its document, `<|endoftext|>` for that of the document it begins. `max_tokens=0` takes all of it.
    The processes of `group` share each batch; every one of them returns the sums over all.
    """
    group = group or Group()
    lengths = token_byte_lengths(shards.tokenizer())
    total = len(shards.tokens("val"))
    starts, runs = shards.val_sources(min(total, max_tokens + 1) if max_tokens else total)
    names = list(dict.fromkeys(runs)) or [shards.manifest.corpus]
    source_of_run = np.array([names.index(name) for name in runs] or [0])
    nats, tokens, size = (np.zeros(len(names)) for _ in range(3))  # of each source
    position = 1  # of the next target in the text
    training = model.training
    model.eval()
    size[source_of_run[0]] += lengths[int(shards.tokens("val")[:1][0])]  # no target, but it may take a byte back
    for batch in val_batches(shards, seq_len, batch_size, max_tokens=max_tokens or None):
        goals = batch[:, 1:]
        where = np.arange(position, position + goals.size).reshape(goals.shape)
        position += goals.size
        source = source_of_run[np.maximum(np.searchsorted(starts, where, "right") - 1, 0)]
        tokens += np.bincount(source.ravel(), minlength=len(names))
        size += np.bincount(source.ravel(), lengths[goals].ravel(), minlength=len(names))
        nats += _nats(model, batch, source, len(names), precision, group)
    nats = group.gather(nats.tolist()).reshape(group.size, -1).sum(0).numpy()
    model.train(training)
    result: dict[str, Any] = _measures(nats.sum(), tokens.sum(), size.sum())
    if len(names) > 1:
        each = zip(names, nats, tokens, size, strict=True)
        result["val_by_source"] = {name: _measures(*sums) for name, *sums in each if sums[2] > 0}
    return result


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
    source: np.ndarray,
    sources: int,
    precision: Callable[[], AbstractContextManager],
    group: Group,
) -> np.ndarray:
    """This process's share of a batch's cross-entropy, in nats, float64 `[sources]`; `source` is `[B, T]`."""
    own = slice(group.rank, None, group.size)
    idle = len(batch) <= group.rank  # a process without a row joins in the collectives, and counts nothing
    ids = torch.from_numpy(batch[:1] if idle else batch[own]).to(group.device)
    inputs, goal = ids[:, :-1], torch.full_like(ids[:, 1:], -100) if idle else ids[:, 1:]
    mine = source[:1] if idle else source[own]
    nats = np.zeros(sources)
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
            return np.bincount(mine.ravel(), losses.double().cpu().numpy(), minlength=sources)
        for number in np.unique(source):  # sharded weights are whole only inside of the model's own forward
            of_source = torch.from_numpy(mine == number).to(group.device)
            only = torch.where(of_source, goal, -100)
            out = model(inputs, shift_labels=only, num_items_in_batch=1, logits_to_keep=1, use_cache=False)
            nats[number] = out.loss.item()
    return nats
