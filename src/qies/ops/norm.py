"""Root-mean-square normalisation without a weight."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis. `[..., D]` -> same shape and dtype; computed in at least fp32.

    Zhang and Sennrich, arXiv:1910.07467, without the gain.
    """
    return _definition(x, eps)


def _definition(x: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
