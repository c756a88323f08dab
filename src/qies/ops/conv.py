"""Short depthwise causal convolution.

Legend: B batch, T position, D channels, k taps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qies.errors import UserError
from qies.ops.autograd import first_order, transformed


def causal_conv(
    x: Tensor, weight: Tensor, state: Tensor | None = None, texts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution, y_t = sum_j weight[:, j] x_{t-k+1+j}. Tap k-1 is the current token.

    Args:
        x: `[B, T, D]`.
        weight: `[D, k]`.
        state: `[B, k-1, D]`, the inputs before x; None for zeros.
        texts: `[B, T]`, a number for each token, equal within a text and different in adjacent texts. Each text is
            convolved separately. Cannot be combined with a state.

    Returns:
        y `[B, T, D]` in the dtype of x, and the new state `[B, k-1, D]`, the last k-1 inputs.

    On CPU without a state there is no second derivative outside torch.func. Raises UserError for shapes that do not
    fit.
    """
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] < 1:
        raise UserError(
            f"causal_conv takes x [B, T, D] and weight [D, k]; got {list(x.shape)} and {list(weight.shape)}."
        )
    batch, length, width = x.shape
    left = weight.shape[1] - 1
    if state is None:
        if x.device.type != "cpu" or transformed():
            return _definition(x, weight, x.new_zeros(batch, left, width), texts)
        recent = x[:, max(0, length - left) :]
        return _CausalConv.apply(x, weight, texts), torch.cat(
            [x.new_zeros(batch, left - recent.shape[1], width), recent], 1
        )
    if texts is not None:
        raise UserError("causal_conv takes a state or texts, not both; the state would enter the first text only.")
    if state.shape != (batch, left, width):
        raise UserError(f"this convolution's state is {[batch, left, width]}; got {list(state.shape)}.")
    return _definition(x, weight, state)


def _definition(x: Tensor, weight: Tensor, state: Tensor, texts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    length, taps = x.shape[1], weight.to(x.dtype).T
    past = torch.cat([state.to(x.dtype), x], 1)
    y = torch.zeros_like(x)
    for j, tap in enumerate(taps):
        source = past[:, j : j + length]
        lag = len(taps) - 1 - j
        if texts is not None and lag:
            within = F.pad(_same_text(texts, lag), (0, 0, lag, 0))[:, :length]
            source = source * within
        y = y + source * tap
    return y, past[:, length:].clone()


class _CausalConv(torch.autograd.Function):
    """The convolution without a state, as shifted multiply-adds: faster than conv1d, mainly in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, texts: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, texts)
        present, *past = _newest_first(x, weight)
        y = x * present
        for lag, tap in enumerate(past, 1):
            y[:, lag:].addcmul_(_within(x[:, :-lag], texts, lag), tap)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, texts = ctx.saved_tensors
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            present, *past = _newest_first(x, weight)
            d_x = grad * present
            for lag, tap in enumerate(past, 1):
                d_x[:, :-lag].addcmul_(_within(grad[:, lag:], texts, lag), tap)
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(weight)
            for lag in range(min(weight.shape[1], x.shape[1])):
                product = grad[:, lag:] * _within(x[:, : x.shape[1] - lag], texts, lag)
                d_weight[:, -1 - lag] = product.sum((0, 1), dtype=d_weight.dtype)
        return d_x, d_weight, None


def _same_text(texts: Tensor, lag: int) -> Tensor:
    """Whether the token `lag` positions before belongs to the same text, bool `[B, T - lag, 1]`."""
    return (texts[:, lag:] == texts[:, : max(0, texts.shape[1] - lag)]).unsqueeze(-1)


def _within(x: Tensor, texts: Tensor | None, lag: int) -> Tensor:
    """x `[B, T - lag, D]`, zero where the token `lag` positions before belongs to another text."""
    return x if texts is None or not lag else x * _same_text(texts, lag)


def _newest_first(x: Tensor, weight: Tensor) -> Tensor:
    """The taps `[.., D]` that fit the length of x, newest first. Contiguous, since strided taps are slow to read."""
    return weight.to(x.dtype).T.flip(0)[: max(1, x.shape[1])].contiguous()
