"""The chunkwise form: parallel inside a chunk, a scan over chunks. README.md derives it."""

from __future__ import annotations

import torch
from torch import Tensor

from qies.ops.entangle.naive import key_rows, value_rows, working_dtype
from qies.ops.pairs import rotate, unit


def entangle_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_alpha: Tensor,
    theta: Tensor | None,
    state: Tensor | None = None,
    mode: str = "real",
) -> tuple[Tensor, Tensor]:
    """`entangle` in chunks; same shapes and returns."""
    dtype = working_dtype(q, k, v, beta, log_alpha, theta, state)
    out_dtype = v.dtype
    r = 1 if mode == "real" else 2
    C = 64 // r if log_alpha.ndim == 3 else 16
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, beta, log_alpha = (x.to(dtype).transpose(1, 2) for x in (q, k, v, beta, log_alpha))
        q, k = unit(q), unit(k)
        B, H, T, _ = q.shape
        Theta = None
        if theta is not None:
            Theta = theta.transpose(1, 2).double().cumsum(2).remainder(2 * torch.pi).to(dtype)
            q, k = rotate(q, -Theta), rotate(k, -Theta)
        Q, K, V = (
            key_rows(q, mode).flatten(2, 3),
            key_rows(k, mode).flatten(2, 3),
            value_rows(v, mode).flatten(2, 3),
        )
        g = log_alpha.unsqueeze(-1) if log_alpha.ndim == 3 else torch.cat([log_alpha, log_alpha], -1)
        S = V.new_zeros(B, H, Q.shape[-1], V.shape[-1]) if state is None else state.to(dtype)
        outputs = []
        for t in range(0, T, C):
            rows = slice(t * r, (t + C) * r)
            o, S = _chunk(
                Q[:, :, rows], K[:, :, rows], V[:, :, rows], beta[:, :, t : t + C], g[:, :, t : t + C], S
            )
            outputs.append(o)
        o = torch.cat(outputs, 2).unflatten(2, (T, r)).flatten(-2).transpose(1, 2)
        if Theta is not None:
            S = rotate(S, Theta[:, :, -1, :, None], dim=-2)
        return o.to(out_dtype), S


def _chunk(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor, S: Tensor
) -> tuple[Tensor, Tensor]:
    """One chunk: q, k `[B,H,Cr,2m]`, v `[B,H,Cr,V]`, beta `[B,H,C(,2)]`, log_alpha `[B,H,C,1 or 2m]`."""
    C = log_alpha.shape[2]
    r = q.shape[2] // C
    g = log_alpha.cumsum(2).repeat_interleave(r, 2)
    token = torch.arange(C, device=q.device).repeat_interleave(r)
    past, present = token[:, None] > token, token[:, None] >= token
    gamma = (g[:, :, :, None] - g[:, :, None]).masked_fill(~present[..., None], -torch.inf).exp()
    L = torch.einsum("bhic,bhjc,bhijc->bhij", k, k, gamma.expand(*gamma.shape[:-1], k.shape[-1])) * past
    P = torch.einsum("bhic,bhjc,bhijc->bhij", q, k, gamma.expand(*gamma.shape[:-1], k.shape[-1]))
    decay = g.exp()
    R = v - (decay * k) @ S
    LB = times_beta(L, beta, r, transpose=True) + torch.eye(C * r, dtype=q.dtype, device=q.device)
    E = torch.linalg.solve_triangular(LB, R, upper=False, unitriangular=True)
    D = times_beta(E.mT, beta, r).mT
    o = (decay * q) @ S + P @ D
    last = g[:, :, -1:]
    return o, last.exp().mT * S + (k * (last - g).exp()).mT @ D


def times_beta(x: Tensor, beta: Tensor, r: int, transpose: bool = False) -> Tensor:
    """B applied to the last axis of x `[.., Cr]` (as to a column of rows), or its transpose."""
    if beta.ndim == 3:
        return x * beta.repeat_interleave(r, -1).unsqueeze(-2)
    re, im = beta.unsqueeze(-3).unbind(-1)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    if transpose:
        im = -im
    return torch.stack([re * a - im * b, re * b + im * a], -1).flatten(-2)
