"""The definition of the op: the recurrence, written as it is stated, one token after the other.

Slow and exact (up to float64); the oracle of every other form.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qies.ops.entangle.layout import Inputs, beta_block, first_tokens, key_rows, no_autocast, value_rows
from qies.ops.pairs import rotate, unit


def entangle_naive(x: Inputs, mode: str = "real") -> tuple[Tensor, Tensor]:
    """`entangle` as the recurrence; same shapes and returns."""
    S = empty_state(x, mode) if x.state is None else x.state.to(x.dtype)
    outputs = []
    with no_autocast(x.q):
        Q = key_rows(unit(x.q.to(x.dtype)), mode)
        for t, S in enumerate(states(x, S, mode)):  # noqa: B020 (the last state is returned)
            outputs.append((Q[:, t] @ S).flatten(-2))
        return torch.stack(outputs, 1).to(x.v.dtype), S


def states(x: Inputs, S: Tensor, mode: str, first: Tensor | None = None) -> Iterator[Tensor]:
    """The state `[B, H, 2m, V]` after each token, from S before the first and before the tokens `first` `[B, T]` bool.

    Autocast must be off.
    """
    k, v, beta, log_alpha = (y.to(x.dtype) for y in (x.k, x.v, x.beta, x.log_alpha))
    K, V = key_rows(unit(k), mode), value_rows(v, mode)
    beta = beta_block(beta, V)
    alpha = log_alpha.exp()
    alpha = alpha[..., None] if alpha.ndim == 3 else torch.cat([alpha, alpha], -1)
    phase, start = None if x.theta is None else x.theta.to(x.dtype), S
    for t in range(k.shape[1]):
        if first is not None:
            S = torch.where(first[:, t, None, None, None], start, S)
        if phase is not None:
            S = rotate(S, phase[:, t, :, :, None], dim=-2)  # evolve
        S = alpha[:, t, :, :, None] * S  # damp
        KB = K[:, t].mT @ beta[:, t]
        S = S - KB @ (K[:, t] @ S)  # measure
        S = S + KB @ V[:, t]  # create
        yield S


def trajectory(x: Inputs, mode: str, texts: Tensor | None = None) -> Tensor:
    """The states after every token, `[B, T, H, 2m, V]`; `texts` as `entangle` takes it. Autocast must be off."""
    start = empty_state(x, mode) if x.state is None else x.state.to(x.dtype)
    return torch.stack(list(states(x, start, mode, None if texts is None else first_tokens(texts))), 1)


def read(q: Tensor, states: Tensor, mode: str) -> Tensor:
    """What queries `[B, T, H, 2m]` read from a state each, `[B, T, H, 2m, V]` -> o `[B, T, H, V]`, `[B, T, H, 2V]`."""
    return (key_rows(unit(q.to(states.dtype)), mode) @ states).flatten(-2)


def empty_state(x: Inputs, mode: str) -> Tensor:
    """The zero state `[B, H, 2m, V]` of a call, in the dtype that states are kept in."""
    channels = x.v.shape[-1] // (2 if mode == "complex" else 1)
    return x.v.new_zeros(len(x.q), *x.q.shape[2:], channels, dtype=x.dtype)
