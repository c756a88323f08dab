"""Torch's FLOP counter with formulas for what it does not know, each written from the shapes of the tensors."""

from __future__ import annotations

from math import prod

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from qies.mixers.entanglement import CHUNK

aten = torch.ops.aten
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)


def raw(formula):
    """A formula that torch gives the tensors, not their shapes."""
    formula._get_raw = True
    return formula


def entangle(q, k, v, beta, log_alpha, theta, state, mode, **_):
    """The op by the convention: C tokens at once, lower halves, r rows a token; one token by the recurrence."""
    B, T, H, K = q.shape
    r = 2 if mode == "complex" else 1
    V = v.shape[-1] // r
    through_state = 3 * 2 * r * K * V
    rows = r * min(CHUNK, T)  # of a chunk
    scores, reads, inverse = 2 * rows**2 * K, 2 * rows**2 * V, rows**3 / 3
    inside = 0 if T == 1 else (scores + reads + inverse) * r / rows
    return B * T * H * (inside + through_state)


def attention(q, k, v, dropout_p=0.0, is_causal=False, **_):
    """q k^T and its use; of a causal square the lower half with its diagonal."""
    B, H, T, K = q
    return 2 * 2 * B * H * K * (T * (T + 1) / 2 if is_causal else T * k[2])


def product(formula):
    """A product of complex numbers is four of real ones."""

    def counted(*args, out_val=None, **kwargs):
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        shapes = (x.shape if isinstance(x, torch.Tensor) else x for x in args)
        flops = formula.__wrapped__(*shapes, out_shape=out_val.shape)
        return flops * (4 if any(x.is_complex() for x in tensors) else 1)

    return raw(counted)


def triangular_solve(a, b, **_):
    """Substitution: n^2 FLOPs a right-hand side."""
    return prod(b) * a[-1]


def counter(**more) -> FlopCounterMode:
    """A `FlopCounterMode` that knows the entanglement op (`torch.ops.qies.entangle`), attention on the CPU, triangular
    systems, and that complex products are dearer."""
    return FlopCounterMode(
        display=False,
        custom_mapping={
            torch.ops.qies.entangle: raw(entangle),
            ATTENTION: attention,
            aten.linalg_solve_triangular: triangular_solve,
            **{packet: product(flop_registry[packet]) for packet in PRODUCTS},
            **more,
        },
    )
