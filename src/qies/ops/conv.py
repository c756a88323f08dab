"""Short depthwise causal convolution.

Legend: B batch, T position, D channels, k taps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def causal_conv(x: Tensor, weight: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y_t = sum_j weight[:, j] x_{t-k+1+j}: tap k-1 is the present token, tap 0 the oldest.

    x `[B, T, D]`, weight `[D, k]`, state `[B, k-1, D]` the inputs before x (None: zeros).
    Returns y `[B, T, D]` and the new state `[B, k-1, D]`, the last k-1 inputs, to be handed in with the next ones.
    """
    return _definition(x, weight, state)


def _definition(x: Tensor, weight: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, length, width = x.shape
    taps = weight.shape[1]
    if state is None:
        state = x.new_zeros(batch, taps - 1, width)
    past = torch.cat([state.to(x.dtype), x], 1)
    y = sum((past[:, j : j + length] * weight[:, j].to(x.dtype) for j in range(taps)), torch.zeros_like(x))
    return y, past[:, length:]
