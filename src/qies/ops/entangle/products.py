"""Batched matrix products in the precision they deserve."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WORTH_ROUNDING = 9_000_000  # multiply-adds below which a plain float32 product is as fast


class Products:
    """`with Products(low, device) as product`: a product that may round its operands to bfloat16.

    With `low` the large products of float32 matrices multiply in bfloat16 and sum in float32 (what the CPU's matrix
    units do); without it, and for small ones, nothing is rounded. Autocast is off inside, and the process-wide setting
    is what it was afterwards. Machines without such units compute in float32.
    """

    def __init__(self, low: bool, device: torch.device):
        self.low = low
        self.setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        self.autocast = torch.autocast(device.type, enabled=False)

    def __enter__(self) -> Products:
        self.before = self.setting.fp32_precision
        self.setting.fp32_precision = "ieee"
        self.autocast.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.autocast.__exit__(*error)
        self.setting.fp32_precision = self.before

    def __call__(self, a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
        """out = a b, or out + a b, for `[Z, i, j]` and `[Z, j, k]`."""
        rounded = self.low and out.numel() * a.shape[-1] >= WORTH_ROUNDING
        if rounded:
            self.setting.fp32_precision = "bf16"
        if add:
            out.baddbmm_(a, b)
        else:
            torch.bmm(a, b, out=out)
        if rounded:
            self.setting.fp32_precision = "ieee"
        return out
