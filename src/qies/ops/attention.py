"""Causal softmax attention over whole, unpadded sequences.

Legend: B batch, H heads, T position, K width per head.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K) + causal mask) v: q, k, v `[B, H, T, K]` -> `[B, H, T, K]`."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)
