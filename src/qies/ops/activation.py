"""The squared rectifier and the two-layer network around it.

Legend: N tokens, D model width, F hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2, any shape. So et al., Primer, arXiv:2109.08668."""
    return torch.relu(x).square()


def mlp(x: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """relu_squared(x w_up^T) w_down^T: x `[..., D]`, w_up `[F, D]`, w_down `[D, F]` -> `[..., D]`."""
    return relu_squared(x @ w_up.T) @ w_down.T
