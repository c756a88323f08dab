"""One token: what decoding runs. The recurrence of naive.py for T = 1 with as few operations as it takes."""

from __future__ import annotations

import torch
from torch import Tensor

from qies.ops.entangle.naive import key_rows, no_autocast, value_rows, working_dtype
from qies.ops.pairs import rotate, unit


def entangle_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_alpha: Tensor,
    theta: Tensor | None,
    state: Tensor | None = None,
    mode: str = "real",
) -> tuple[Tensor, Tensor]:
    """`entangle` for T = 1, same shapes and returns. Reads the state twice and writes it once."""
    dtype = working_dtype(q, k, v, beta, log_alpha, theta, state)
    out_dtype = v.dtype
    with no_autocast(q):
        q, k, v, beta, log_alpha = (x[:, 0].to(dtype) for x in (q, k, v, beta, log_alpha))
        Q, K, V = key_rows(unit(q), mode), key_rows(unit(k), mode), value_rows(v, mode)
        S = V.new_zeros(*k.shape, V.shape[-1]) if state is None else state.to(dtype)
        if theta is not None:
            S = rotate(S, theta[:, 0].to(dtype).unsqueeze(-1), dim=-2)
        alpha = log_alpha.exp()
        S = S * (alpha[..., None, None] if alpha.ndim == 2 else torch.cat([alpha, alpha], -1)[..., None])
        E = V - K @ S
        if beta.ndim == 2:
            D = beta[..., None, None] * E
        else:
            re, im = beta[..., None].unbind(-2)
            D = torch.stack([re * E[..., 0, :] - im * E[..., 1, :], re * E[..., 1, :] + im * E[..., 0, :]], -2)
        S = S + K.mT @ D
        return (Q @ S).flatten(-2).unsqueeze(1).to(out_dtype), S
