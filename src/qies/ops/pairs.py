"""Complex vectors as real pairs: z in C^m is stored as `[Re z | Im z]` in R^{2m}.

Every function takes the axis that holds the pair as `dim`, works on any floating dtype and is differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_complex(x: Tensor, dim: int = -1) -> Tensor:
    """The complex tensor `[.., m, ..]` of a pair `[.., 2m, ..]`; dtype float32 or float64."""
    re, im = x.chunk(2, dim)
    return torch.complex(re.contiguous(), im.contiguous())


def to_pair(z: Tensor, dim: int = -1) -> Tensor:
    """The pair `[.., 2m, ..]` of a complex tensor `[.., m, ..]`."""
    return torch.cat([z.real, z.imag], dim)


def times_i(x: Tensor, dim: int = -1) -> Tensor:
    """J x: multiplication by the imaginary unit, (a|b) -> (-b|a). Same shape."""
    re, im = x.chunk(2, dim)
    return torch.cat([-im, re], dim)


def rotate(x: Tensor, phase: Tensor, dim: int = -1) -> Tensor:
    """diag(e^{i phase}) x for a pair x `[.., 2m, ..]`; phase in radians broadcasts against one half."""
    re, im = x.chunk(2, dim)
    cos, sin = phase.cos(), phase.sin()
    return torch.cat([re * cos - im * sin, re * sin + im * cos], dim)


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """x / |x| without over- or underflow, and zero for the zero vector (with a zero gradient). Same shape."""
    largest = x.detach().abs().amax(dim, keepdim=True)  # a constant factor does not change the direction
    none = largest == 0
    x = x / largest.masked_fill(none, torch.inf)
    return x * torch.rsqrt(x.square().sum(dim, keepdim=True) + none)
