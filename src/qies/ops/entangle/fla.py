"""The op on the CUDA kernels of flash-linear-attention: README.md ("CUDA") gives the mapping, the kernels are theirs.

`mapping` prepares a kernel's arguments and `results` reads what it returns; both are plain tensor arithmetic on any
device, so that they are tested with the package's own slow references in the kernels' place.

The gated delta rule: S. Yang et al., arXiv:2412.06464. A decay per channel: Kimi Linear, arXiv:2510.26692.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qies.errors import UserError
from qies.ops.entangle.layout import MAX_TOKEN_DECAY, Inputs, no_autocast, running_phase
from qies.ops.pairs import rotate, times_i, unit

KERNELS = {"gated_delta_rule": "chunk_gated_delta_rule", "kda": "chunk_kda"}  # by their folder in fla.ops
WIDEST = 256  # real key channels, 2m, that the kernels take


class Call(NamedTuple):
    """A kernel's name and arguments, and what turns its results into those of the op."""

    kernel: str
    arguments: dict[str, Any]
    phase: Tensor | None  # `[B, H, m]`, Theta after the last token
    echo: Tensor | None  # `[B, T, H, V]` in complex mode: what the first of a token's two reads has yet to see


def entangle_fla(x: Inputs, mode: str = "real") -> tuple[Tensor, Tensor]:
    """`entangle` on a CUDA device; same shapes and returns. Once differentiable.

    Keys, queries and values are rounded to the half precision of autocast or of v; beta, decay, phase and the carried
    state are float32.

    Raises:
        UserError: no CUDA device, no package, or a case that no kernel expresses (see `obstacle`).
    """
    reason = obstacle(x)
    if reason is not None:
        raise UserError(reason)
    dtype = kernel_dtype(x.v)
    with no_autocast(x.q):
        call = mapping(x, mode, dtype)
        o, state = results(call, *kernel(call.kernel)(**call.arguments))
    return o.to(x.v.dtype), state


def mapping(x: Inputs, mode: str = "real", dtype: torch.dtype = torch.float32) -> Call:
    """The inputs of `entangle`, beta real, as one call of a kernel on T tokens, or 2T in complex mode.

    `dtype` is that of the keys, queries and values the kernel gets; all else is float32.
    """
    q, k, v, beta = unit(x.q.float()), unit(x.k.float()), x.v.float(), x.beta.float()
    g = x.log_alpha.float().clamp(min=-MAX_TOKEN_DECAY)
    if g.ndim == 4:
        g = torch.cat([g, g], -1)
    phase = echo = None
    if x.theta is not None:
        running = running_phase(x.theta, torch.float32)
        q, k, phase = rotate(q, -running), rotate(k, -running), running[:, -1]
    if mode == "complex":
        # two real tokens: the second writes along Jk and is read by q; the first is read by Jq, through the second
        jk, (re, im) = times_i(k), v.chunk(2, -1)
        seen = (beta * (q * k).sum(-1)).unsqueeze(-1)
        echo = seen * im
        q, k, v = by_turns(times_i(q) - seen * jk, q), by_turns(k, jk), by_turns(re, im)
        beta, g = by_turns(beta, beta), by_turns(g, torch.zeros_like(g))
    arguments = {
        "q": q.to(dtype),
        "k": k.to(dtype),
        "v": v.to(dtype),
        "beta": beta,
        "g": g,
        "scale": 1.0,
        "initial_state": None if x.state is None else x.state.float(),
        "output_final_state": True,
    }
    return Call("gated_delta_rule" if x.log_alpha.ndim == 3 else "kda", arguments, phase, echo)


def results(call: Call, o: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """What the kernel returned as (o, state) of `entangle`, the state in the physical gauge."""
    if call.echo is not None:
        im, re = o.unflatten(1, (-1, 2)).unbind(2)
        o = torch.cat([re, im + call.echo], -1)
    if call.phase is not None:
        state = rotate(state, call.phase.unsqueeze(-1), dim=-2)
    return o, state


def by_turns(first: Tensor, second: Tensor) -> Tensor:
    """Two tokens for each: `[B, T, ..]` twice -> `[B, 2T, ..]`."""
    return torch.stack([first, second], 2).flatten(1, 2)


def obstacle(x: Inputs) -> str | None:
    """Why these inputs cannot run on the kernels, in one line that says what to do; None when they can."""
    return missing(x.q.device) or inexpressible(x)


def missing(device: torch.device) -> str | None:
    """What the machine lacks, or None."""
    if device.type != "cuda":
        return f"backend 'fla' needs a CUDA device but the inputs are on {device.type}; use backend='auto'."
    if not installed():
        return "backend 'fla' needs flash-linear-attention; pip install 'qies[cuda]' or use backend='chunk'."
    return None


def inexpressible(x: Inputs) -> str | None:
    """What no kernel expresses, or None."""
    if x.beta.ndim == 4:
        return (
            "backend 'fla' has no kernel for complex beta [B, T, H, 2]; use backend='chunk', or a real beta [B, T, H]."
        )
    if x.q.shape[-1] > WIDEST:
        return f"backend 'fla' takes keys of up to 2m = {WIDEST} but q has {x.q.shape[-1]}; use backend='chunk'."
    dtype = torch.float64 if x.dtype == torch.float64 else kernel_dtype(x.v)
    if dtype not in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        return f"backend 'fla' computes in half precision, not {name}; use backend='chunk', or autocast to bfloat16."
    return None


def kernel_dtype(v: Tensor) -> torch.dtype:
    """The dtype of autocast where it is on, else that of v."""
    device = v.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else v.dtype


@functools.cache
def installed() -> bool:
    """Whether the package and the Triton it is written in are there."""
    return all(importlib.util.find_spec(name) is not None for name in ("fla", "triton"))


def kernel(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """A kernel of the package, which is imported when first used."""
    try:
        return getattr(importlib.import_module(f"fla.ops.{name}"), KERNELS[name])
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"flash-linear-attention has no usable {KERNELS[name]} ({error}); reinstall it or use backend='chunk'."
        ) from error
