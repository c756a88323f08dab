"""What the hand-written gradients share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether an op must run as its plain definition, which torch can differentiate and trace in every way.

    True inside a transform of torch.func (grad, jvp, vmap), in forward-mode differentiation and in an export.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Marks the backward of an autograd.Function that has no derivative of its own.

    Unlike `once_differentiable`, which drops the terms that come through the saved tensors without a word, it
    raises RuntimeError whenever a graph of the backward pass is asked for (`create_graph=True`).
    """

    @wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(ctx).__name__.removesuffix('Backward')} has no second derivative; "
                "call its plain definition where create_graph=True is needed"
            )
        return backward(ctx, *grads)

    return checked
