"""In-context copying: the gain of a model on the repeat of a random segment (Olsson et al., arXiv:2209.11895)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from qies.config import INDUCTION_ONSET
from qies.model import QiesForCausalLM

SEGMENT = 64  # tokens, drawn uniformly from the vocabulary
ROWS = 16
FIRST = 2**16  # tokens of training at the first evaluation


def due(tokens: int, step: int) -> bool:
    """Whether to evaluate after the step of `step` tokens that ends at `tokens`: 4 times per doubling, from 2^16 on.

    The times depend on tokens only, so runs of any budget, and branches of a run, are evaluated at the same points.
    """
    return tokens >= FIRST and int(4 * math.log2(tokens)) > int(4 * math.log2(max(tokens - step, FIRST / 2)))


@torch.no_grad()
def induction_gain(
    model: QiesForCausalLM,
    *,
    seq_len: int,
    precision: Callable[[], AbstractContextManager],
    device: torch.device | str = "cpu",
) -> float:
    """Loss on random segments minus the loss on their repeats, in nats per token; 0 for a model that does not copy.

    Each of 16 rows is a segment of n = min(64, seq_len / 2) tokens, repeated once, so it fits the training context. The
    segments are the same for every model with the same vocabulary size. The losses are those of tokens 2 to n of each
    copy. Does not use torch's random number generators.
    """
    length = max(2, min(SEGMENT, seq_len // 2))
    segment = np.random.default_rng(0).integers(1, model.config.vocab_size, (ROWS, length))
    ids = torch.from_numpy(np.concatenate([segment, segment], 1)).to(device)
    training = model.training
    model.eval()
    losses = []
    for start in (0, length):
        labels = torch.full_like(ids, -100)
        labels[:, start + 1 : start + length] = ids[:, start + 1 : start + length]
        with precision():
            out = model(ids[:, :-1], shift_labels=labels[:, 1:], logits_to_keep=1, use_cache=False)
        losses.append(out.loss.item())
    model.train(training)
    return losses[0] - losses[1]


def onset(rows: Iterable[Mapping[str, Any]]) -> int | None:
    """Tokens at the first evaluation from which on the gain stays at or above INDUCTION_ONSET; None if there is none.

    rows: the rows of metrics.jsonl, in order; rows without `induction` are ignored.
    """
    first = None
    for row in rows:
        if (gain := row.get("induction")) is not None:
            first = (first or row["tokens"]) if gain >= INDUCTION_ONSET else None
    return first
