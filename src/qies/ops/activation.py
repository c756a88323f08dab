"""The squared rectifier and the two-layer network around it.

Legend: D model width, F hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qies.ops.autograd import first_order, transformed


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2, any shape. So et al., Primer, arXiv:2109.08668. Has no second derivative outside torch.func."""
    if transformed():
        return torch.relu(x).square()
    return _ReluSquared.apply(x)


def mlp(x: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """relu_squared(x w_up^T) w_down^T: x `[..., D]`, w_up `[F, D]`, w_down `[D, F]` -> `[..., D]`.

    A version fused by chunks of tokens was no faster: the matrix products prefer all tokens at once.
    """
    return relu_squared(x @ w_up.T) @ w_down.T


class _ReluSquared(torch.autograd.Function):
    """Keeps max(x, 0) alone: the gradient is 2 max(x, 0) g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = torch.relu(x)
        ctx.save_for_backward(positive)
        return positive.square()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return torch.addcmul(grad.new_zeros(()), grad, positive, value=2)  # one pass over memory
