"""Root-mean-square normalisation (RMSNorm) without a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qies.ops.autograd import first_order, transformed


def rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis. x `[..., D]`; returns the same shape and dtype.

    Computed in float32 or wider. RMSNorm without a gain: Zhang and Sennrich, arXiv:1910.07467. On CPU there is no
    second derivative outside torch.func.
    """
    if x.device.type == "cpu" and x.numel() > 0 and not transformed():
        return _RmsNorm.apply(x, eps) if torch.is_grad_enabled() else _with_rate(x, eps)[0]
    return _definition(x, eps)


def _definition(x: Tensor, eps: float) -> Tensor:
    wide = _widen(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _with_rate(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normalised x, and what it was multiplied by, `[..., 1]`."""
    wide = _widen(x)
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # one pass, without a temporary of the size of x
    rate = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * rate).to(x.dtype), rate


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        out, rate = _with_rate(x, eps)
        ctx.save_for_backward(x, rate)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """dx = rate * g - x * rate^3 * mean(g * x)."""
        x, rate = ctx.saved_tensors
        wide, grad = _widen(x), _widen(grad)
        product = grad * wide
        overlap = product.sum(-1, keepdim=True).mul_(rate.pow(3))
        torch.mul(grad, rate, out=product)  # the buffer is still in cache
        return product.addcmul_(wide, overlap, value=-1 / x.shape[-1]).to(x.dtype), None
