"""Loss on held-out text, in nats a token and bits a byte."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from qies.data.batches import val_batches
from qies.data.shards import Shards
from qies.data.tokenizer import token_byte_lengths
from qies.model import QiesForCausalLM
from qies.objective import bits_per_byte
from qies.ops.loss import linear_cross_entropy


@torch.no_grad()
def held_out_loss(
    model: QiesForCausalLM,
    shards: Shards,
    *,
    seq_len: int,
    batch_size: int,
    max_tokens: int = 0,
    precision: Callable[[], AbstractContextManager],
) -> dict[str, float]:
    """Cross-entropy over the validation text, every token predicted once (but the first), in windows of `seq_len`.

    Returns val_loss (nats a token), val_bpb (bits a byte of the same text, whatever the tokenizer), val_tokens and
    val_bytes. `max_tokens=0` takes all of it.
    """
    lengths = torch.from_numpy(token_byte_lengths(shards.tokenizer()))
    nats, tokens, size = 0.0, 0, 0
    training = model.training
    model.eval()
    for batch in val_batches(shards, seq_len, batch_size, max_tokens=max_tokens or None):
        ids = torch.from_numpy(batch)
        targets = ids[:, 1:]
        with precision():
            hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
            losses = linear_cross_entropy(
                hidden.flatten(0, 1),
                model.lm_head.weight,
                targets.flatten(),
                softcap=model.config.logit_softcap or None,
                reduction="none",
            )
        nats += losses.double().sum().item()
        tokens += targets.numel()
        size += int(lengths[targets].sum())
    model.train(training)
    return {
        "val_loss": nats / tokens,
        "val_bpb": bits_per_byte(nats, size),
        "val_tokens": tokens,
        "val_bytes": size,
    }
