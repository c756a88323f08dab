"""The chunkwise form in torch operations, for any device and dtype: parallel inside chunks, a scan over their states.

README.md derives it. On the processor in float32 `fused` is the same form, several times faster.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qies.ops.entangle.naive import beta_block, key_rows, no_autocast, value_rows, working_dtype
from qies.ops.pairs import rotate, unit

CHUNK = 64  # key rows: tokens, or half as many in complex mode
CALM = 60.0  # a chunk damps to e^-60 at most: its rescaled halves are far from over- and underflow in float32
FAINT = 40.0  # inside a chunk a token that damps beyond e^-40 damps to e^-40: nothing, to the rounding of float64
TURN = 2 * torch.pi


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
    (B, T, H, K), out_dtype = q.shape, v.dtype
    with no_autocast(q):
        q, k, v, beta, log_alpha = (x.to(dtype) for x in (q, k, v, beta, log_alpha))
        # keys in float64, or the same small error in every length would add up over a long row of reflections
        q, k = unit(q), unit(k.double()).to(dtype)
        if theta is not None:
            phase = running_phase(theta, dtype)
            q, k = rotate(q, -phase), rotate(k, -phase)
        Q, keys, values = key_rows(q, mode), key_rows(k, mode), value_rows(v, mode)
        r = keys.shape[-2]
        writes = beta_block(beta, values).mT @ keys
        C = calm(log_alpha, min(T, CHUNK // r))
        read, write, enter, leave = damping(chunks(log_alpha, C))
        Q, keys, writes, values = (chunks(x, C) for x in (Q, keys, writes, values))  # [n, B, H, C, r, ..]
        Q, keys, writes = Q * read, keys * read, writes * write
        Q, keys, writes, values = (x.flatten(-3, -2) for x in (Q, keys, writes, values))  # [n, B, H, C r, ..]

        present = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
        present, past = (x.repeat_interleave(r, 0).repeat_interleave(r, 1) for x in (present, present.tril(-1)))
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
        return o.to(out_dtype), S


def chunks(x: Tensor, C: int) -> Tensor:
    """`[B, T, H, ..]` as `[n, B, H, C, ..]`, padded with tokens of zeros, which do nothing."""
    x = F.pad(x, [0, 0] * (x.ndim - 2) + [0, -x.shape[1] % C])
    return x.unflatten(1, (-1, C)).permute(1, 0, 3, 2, *range(4, x.ndim + 1))


def running_phase(theta: Tensor, dtype: torch.dtype) -> Tensor:
    """The running sum of theta over tokens, less its whole turns: exact however large the angles and long the text."""
    theta = theta.double()
    if dtype == torch.float64:  # float32 does not see how theta / TURN is rounded, and need not pay for better
        given = theta.detach()
        within = torch.atan2(given.sin(), given.cos())  # a multiple of TURN taken away would bring its own rounding
        theta = within + (theta - given)  # the gradient of theta, and nothing kept for it
    turns = (theta / TURN).cumsum(1)
    return ((turns - turns.round()) * TURN).to(dtype)


def readable(*tensors: Tensor) -> bool:
    """Whether these hold numbers: not stand-ins of an export or of torch.func, nor on the meta device."""
    if any(type(x) not in (Tensor, torch.nn.Parameter) or x.device.type == "meta" for x in tensors):
        return False
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    return not any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors))


def calm(log_alpha: Tensor, C: int) -> int:
    """The longest chunk, C halved as often as it takes, whose tokens after the first damp to e^-CALM at most.

    Where the numbers cannot be read, as in an export, two tokens: always calm, and slow.
    """
    if not readable(log_alpha):
        return min(C, 2)
    damped = log_alpha.detach().clamp(-FAINT, 0).neg()
    while C > 1 and damped.numel() and chunks(damped, C)[:, :, :, 1:].sum(3).amax() > CALM:
        C = (C + 1) // 2
    return C


def damping(log_alpha: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How rows are rescaled so that every product carries its own decay, from `[n, B, H, C(, m)]`.

    With g the running sum without the first token's, which acts on the state alone, and c half its last value: reads
    e^{g - c} and writes e^{c - g} `[n, B, H, C, 1, 1 or 2m]`; the state before by e^{c} and the first token's decay,
    after by e^{c} `[n, B, H, 1 or 2m, 1]`.
    """
    log_alpha = log_alpha.unsqueeze(-1) if log_alpha.ndim == 4 else torch.cat([log_alpha, log_alpha], -1)
    first, rest = log_alpha[..., :1, :], log_alpha[..., 1:, :].clamp(min=-FAINT)
    g = torch.cat([torch.zeros_like(first), rest], -2).cumsum(-2)
    c = g[..., -1:, :] / 2
    read, write = ((x.exp()).unsqueeze(-2) for x in (g - c, c - g))
    return read, write, (c + first).exp().mT, c.exp().mT
