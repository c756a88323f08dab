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
) -> dict[str, float]:
    """Cross-entropy over the validation text, every token predicted once (but the first), in windows of `seq_len`.

    Returns val_loss (nats a token), val_bpb (bits a byte of the same text, whatever the tokenizer), val_tokens and
    val_bytes. `max_tokens=0` takes all of it.
    The processes of `group` share each batch; every one of them returns the sums over all.
    """
    group = group or Group()
    lengths = torch.from_numpy(token_byte_lengths(shards.tokenizer()))
    nats, tokens, size = 0.0, 0, 0
    training = model.training
    model.eval()
    for batch in val_batches(shards, seq_len, batch_size, max_tokens=max_tokens or None):
        ids = torch.from_numpy(batch)
        own = ids[group.rank :: group.size]
        mine = own if len(own) else ids[:1]  # a process without a row joins in the collectives, and counts nothing
        targets = mine[:, 1:] if len(own) else torch.full_like(mine[:, 1:], -100)
        with precision():
            inputs, goal = mine[:, :-1].to(group.device), targets.to(group.device)
            if group.size == 1:  # the sum in fp64
                hidden = model.model(inputs, use_cache=False).last_hidden_state
                losses = linear_cross_entropy(
                    hidden.flatten(0, 1),
                    model.lm_head.weight,
                    goal.flatten(),
                    softcap=model.config.logit_softcap or None,
                    reduction="none",
                )
                nats += losses.double().sum().item()
            else:  # sharded weights are whole only inside of the model's own forward
                out = model(inputs, shift_labels=goal, num_items_in_batch=1, logits_to_keep=1, use_cache=False)
                nats += out.loss.item()
        tokens += ids[:, 1:].numel()
        size += int(lengths[ids[:, 1:]].sum())
    nats = group.gather([nats]).sum().item()
    model.train(training)
    return {
        "val_loss": nats / tokens,
        "val_bpb": bits_per_byte(nats, size),
        "val_tokens": tokens,
        "val_bytes": size,
    }
