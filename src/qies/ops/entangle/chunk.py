"""The chunkwise form in torch operations, for any device and dtype: parallel inside chunks, a scan over their states.

README.md derives it. On the CPU in float32, `backend="fused"` (`cpu/`) computes the same form, several times faster.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qies.ops.entangle.layout import (
    MAX_CHUNK_DECAY,
    MAX_TOKEN_DECAY,
    Inputs,
    beta_block,
    key_rows,
    no_autocast,
    readable,
    running_phase,
    value_rows,
)
from qies.ops.pairs import rotate, unit

CHUNK = 64  # key rows: tokens, or half as many in complex mode


def entangle_chunk(x: Inputs, mode: str = "real") -> tuple[Tensor, Tensor]:
    """`entangle` in chunks; same shapes and returns."""
    dtype, theta, state = x.dtype, x.theta, x.state
    B, T, H, K = x.q.shape
    with no_autocast(x.q):
        q, k, v, beta, log_alpha = (y.to(dtype) for y in x[:5])
        # keys in float64: equal small errors in every length would add up over a long sequence of reflections
        q, k = unit(q), unit(k.double()).to(dtype)
        if theta is not None:
            phase = running_phase(theta, dtype)
            q, k = rotate(q, -phase), rotate(k, -phase)
        Q, keys, values = key_rows(q, mode), key_rows(k, mode), value_rows(v, mode)
        r = keys.shape[-2]
        writes = beta_block(beta, values).mT @ keys
        C = chunk_length(log_alpha, min(T, CHUNK // r))
        read, write, enter, leave = damping(chunks(log_alpha, C))
        Q, keys, writes, values = (chunks(y, C) for y in (Q, keys, writes, values))  # [n, B, H, C, r, ..]
        Q, keys, writes = Q * read, keys * read, writes * write
        Q, keys, writes, values = (y.flatten(-3, -2) for y in (Q, keys, writes, values))  # [n, B, H, C r, ..]

        present = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
        present, past = (y.repeat_interleave(r, 0).repeat_interleave(r, 1) for y in (present, present.tril(-1)))
        seen = (keys @ writes.mT).masked_fill(~past, 0)
        P = (Q @ writes.mT).masked_fill(~present, 0)
        solved = torch.linalg.solve_triangular(seen, torch.cat([values, keys], -1), upper=False, unitriangular=True)
        U, W = solved.split([values.shape[-1], K], -1)

        S = v.new_zeros(B, H, K, values.shape[-1]) if state is None else state.to(dtype)
        outputs = []
        for i in range(len(U)):
            S = enter[i] * S
            E = U[i] - W[i] @ S
            outputs.append(Q[i] @ S + P[i] @ E)
            S = leave[i] * (S + writes[i].mT @ E)
        o = torch.stack(outputs, 1).unflatten(3, (C, r)).transpose(2, 3)  # [B, n, C, H, r, V]
        o = o.flatten(1, 2)[:, :T].flatten(-2)
        if theta is not None:
            S = rotate(S, phase[:, -1].unsqueeze(-1), dim=-2)
        return o.to(x.v.dtype), S


def chunks(x: Tensor, C: int) -> Tensor:
    """`[B, T, H, ..]` as `[n, B, H, C, ..]`, padded with zeros, which change no state."""
    x = F.pad(x, [0, 0] * (x.ndim - 2) + [0, -x.shape[1] % C])
    return x.unflatten(1, (-1, C)).permute(1, 0, 3, 2, *range(4, x.ndim + 1))


def chunk_length(log_alpha: Tensor, C: int) -> int:
    """The longest chunk, C halved as often as needed, whose tokens after the first decay to e^-MAX_CHUNK_DECAY at most.

    Where the numbers cannot be read, as in an export, two tokens: always within the limit, and slow.
    """
    if not readable(log_alpha):
        return min(C, 2)
    decay = log_alpha.detach().clamp(-MAX_TOKEN_DECAY, 0).neg()
    while C > 1 and decay.numel() and chunks(decay, C)[:, :, :, 1:].sum(3).amax() > MAX_CHUNK_DECAY:
        C = (C + 1) // 2
    return C


def damping(log_alpha: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How rows are rescaled so that every product carries its own decay, from `[n, B, H, C(, m)]`.

    With g the running sum without the first token's, which acts on the state alone, and c half its last value: reads
    e^{g - c} and writes e^{c - g} `[n, B, H, C, 1, 1 or 2m]`; the state before by e^{c} and the first token's decay,
    after by e^{c} `[n, B, H, 1 or 2m, 1]`.
    """
    log_alpha = log_alpha.unsqueeze(-1) if log_alpha.ndim == 4 else torch.cat([log_alpha, log_alpha], -1)
    first, rest = log_alpha[..., :1, :], log_alpha[..., 1:, :].clamp(min=-MAX_TOKEN_DECAY)
    g = torch.cat([torch.zeros_like(first), rest], -2).cumsum(-2)
    c = g[..., -1:, :] / 2
    read, write = ((x.exp()).unsqueeze(-2) for x in (g - c, c - g))
    return read, write, (c + first).exp().mT, c.exp().mT
