"""The training objective, and bits per byte."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from qies.ops.loss import linear_cross_entropy


def language_modelling(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, count: Tensor | int | None = None
) -> Tensor:
    """Mean cross-entropy in nats per token: hidden [..,D], head weight [V,D], targets [..] (-100: ignored).

    With `count` the sum is divided by it instead, so that accumulated micro-batches add up to one mean.
    """
    flat, goal = hidden.flatten(0, -2), targets.flatten()
    mean = linear_cross_entropy(flat, weight, goal, softcap=softcap or None)
    return mean if count is None else mean * (goal != -100).sum() / count


def language_modelling_of_logits(logits: Tensor, targets: Tensor, count: Tensor | int | None = None) -> Tensor:
    """The same from logits [..,V], for a head that is more than one matrix."""
    goal = targets.flatten()
    total = F.cross_entropy(logits.flatten(0, -2), goal, ignore_index=-100, reduction="sum")
    return total / ((goal != -100).sum().clamp(min=1) if count is None else count)


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Summed cross-entropy in nats of a text of `n_bytes` UTF-8 bytes -> bits per byte, free of the tokenizer."""
    return nats / (math.log(2) * n_bytes)
