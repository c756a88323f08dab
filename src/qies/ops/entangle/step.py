"""One token, as decoding needs it: the recurrence of naive.py for T = 1 in as few operations as possible."""

from __future__ import annotations

import torch
from torch import Tensor

from qies.ops.entangle.layout import Inputs, key_rows, no_autocast, value_rows
from qies.ops.pairs import rotate, unit


def entangle_step(x: Inputs, mode: str = "real") -> tuple[Tensor, Tensor]:
    """`entangle` for T = 1, same shapes and returns. Reads the state twice and writes it once."""
    dtype, theta, state = x.dtype, x.theta, x.state
    with no_autocast(x.q):
        q, k, v, beta, log_alpha = (y[:, 0].to(dtype) for y in x[:5])
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
        return (Q @ S).flatten(-2).unsqueeze(1).to(x.v.dtype), S
