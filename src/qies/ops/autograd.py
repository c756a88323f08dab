"""Helpers of the hand-written gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether an op must use its plain definition, which torch can transform and trace.

    True inside a transform of torch.func (grad, jvp, vmap), in forward-mode differentiation and in an export.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the backward of an autograd.Function that has no second derivative.

    `once_differentiable` silently drops the terms of the saved tensors; this raises RuntimeError if a graph of the
    backward pass is requested (`create_graph=True`).
    """

    @wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(ctx).__name__.removesuffix('Backward')} has no second derivative; "
                "call its plain definition if you need create_graph=True"
            )
        return backward(ctx, *grads)

    return checked
