"""The definition of the op: the recurrence, written as it is stated, one token after the other.

Slow and exact (up to float64); the oracle of every other form.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from qies.ops.pairs import rotate, times_i, unit


def working_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 when an input is, float32 otherwise: decay, phase and state are never kept in less."""
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """The context in which products keep their inputs' precision, on the device of x (the meta device has no other)."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def key_rows(x: Tensor, mode: str) -> Tensor:
    """The vectors a token reads or writes along, `[.., 2m]` -> `[.., r, 2m]`: x, and Jx in complex mode."""
    return x.unsqueeze(-2) if mode == "real" else torch.stack([x, times_i(x)], -2)


def value_rows(v: Tensor, mode: str) -> Tensor:
    """One row of values per key row: `[.., V]` -> `[.., 1, V]`, or a pair `[.., 2V]` -> `[.., 2, V]`."""
    return v.unflatten(-1, (1 if mode == "real" else 2, -1))


def beta_block(beta: Tensor, values: Tensor) -> Tensor:
    """beta as an `[.., r, r]` matrix on the key rows; a pair is multiplication by the complex number."""
    r = values.shape[-2]
    if beta.ndim == values.ndim - 2:
        return beta[..., None, None] * torch.eye(r, dtype=beta.dtype, device=beta.device)
    re, im = beta.unbind(-1)
    return torch.stack([torch.stack([re, -im], -1), torch.stack([im, re], -1)], -2)


def entangle_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_alpha: Tensor,
    theta: Tensor | None,
    state: Tensor | None = None,
    mode: str = "real",
) -> tuple[Tensor, Tensor]:
    """The recurrence of `entangle`, same shapes and returns."""
    dtype = working_dtype(q, k, v, beta, log_alpha, theta, state)
    out_dtype = v.dtype
    with no_autocast(q):
        q, k, v, beta, log_alpha = (x.to(dtype) for x in (q, k, v, beta, log_alpha))
        Q, K, V = key_rows(unit(q), mode), key_rows(unit(k), mode), value_rows(v, mode)
        beta = beta_block(beta, V)
        alpha = log_alpha.exp()
        alpha = alpha[..., None] if log_alpha.ndim == 3 else torch.cat([alpha, alpha], -1)
        phase = None if theta is None else theta.to(dtype)
        S = V.new_zeros(q.shape[0], q.shape[2], q.shape[3], V.shape[-1]) if state is None else state.to(dtype)
        outputs = []
        for t in range(q.shape[1]):
            if phase is not None:
                S = rotate(S, phase[:, t, :, :, None], dim=-2)  # evolve
            S = alpha[:, t, :, :, None] * S  # damp
            KB = K[:, t].mT @ beta[:, t]
            S = S - KB @ (K[:, t] @ S)  # measure
            S = S + KB @ V[:, t]  # create
            outputs.append((Q[:, t] @ S).flatten(-2))
        return torch.stack(outputs, 1).to(out_dtype), S
