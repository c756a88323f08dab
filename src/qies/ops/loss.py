"""Next-token cross-entropy straight from the hidden states: the `[N, V]` logits are never kept.

Legend: N tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = 15.0,
    ignore_index: int = -100,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Cross-entropy in nats of `targets` under logits = softcap * tanh(hidden weight^T / softcap).

    hidden `[N, D]`, weight `[V, D]`, targets int64 `[N]` in [0, V) or `ignore_index`. `softcap=None` leaves the logits
    as they are. "mean" averages over the targets that are not ignored (0 when all are); "none" gives `[N]`, 0 where
    ignored. fp32 (float64 for float64 input). Soft-capping of logits: Gemma 2, arXiv:2408.00118.
    """
    return _definition(hidden, weight, targets, softcap, ignore_index, reduction)


def _definition(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, ignore_index: int, reduction: str
) -> Tensor:
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
    if reduction == "none":
        return losses
    return losses.sum() / (targets != ignore_index).sum().clamp(min=1)
