"""The op's inputs, and what all of its forms share: dtypes, rows of a token, packed texts, the running phase.

Legend: B batch, T position, H heads, m complex key channels, K = 2m, V value channels, r rows a token (1 real,
2 complex).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qies.ops.pairs import times_i

MAX_CHUNK_DECAY = 60.0  # a chunk decays to e^-60 at most: its rescaled halves neither over- nor underflow in float32
MAX_TOKEN_DECAY = 40.0  # decay beyond e^-40 a token is clamped where it can be: float64 does not resolve more
TURN = 2 * torch.pi


class Inputs(NamedTuple):
    """The tensors of one call, as `qies.ops.entangle.entangle` describes them."""

    q: Tensor  # [B,T,H,2m]
    k: Tensor  # [B,T,H,2m]
    v: Tensor  # [B,T,H,V], in complex mode [B,T,H,2V]
    beta: Tensor  # [B,T,H], in complex mode also [B,T,H,2]
    log_alpha: Tensor  # [B,T,H] or [B,T,H,m]
    theta: Tensor | None  # [B,T,H,m]
    state: Tensor | None = None  # [B,H,2m,V]

    @property
    def given(self) -> list[Tensor]:
        """The tensors that are not None."""
        return [x for x in self if x is not None]

    @property
    def dtype(self) -> torch.dtype:
        """float64 when an input is, else float32: decay, phase and state are never kept in less."""
        return torch.float64 if any(x.dtype == torch.float64 for x in self.given) else torch.float32


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


def first_tokens(texts: Tensor) -> Tensor:
    """Where a text other than a row's first begins, `[B, T]` bool, from `texts` as `entangle` takes them."""
    return F.pad(texts[:, 1:] != texts[:, :-1], (1, 0))


def reset_at(log_alpha: Tensor, first: Tensor) -> Tensor:
    """log_alpha with alpha = 0 at the tokens `first` `[B, T]` bool: what came before is forgotten exactly."""
    return log_alpha.masked_fill(first.view(*first.shape, *[1] * (log_alpha.ndim - 2)), -torch.inf)


def running_phase(theta: Tensor, dtype: torch.dtype) -> Tensor:
    """The running sum of theta over tokens modulo 2 pi, summed in float64: exact for large angles and long texts."""
    theta = theta.double()
    if dtype == torch.float64:  # float32 does not resolve the rounding of theta / TURN
        given = theta.detach()
        within = torch.atan2(given.sin(), given.cos())  # subtracting a multiple of TURN would round
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
