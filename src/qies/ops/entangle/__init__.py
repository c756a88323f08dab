"""The entanglement op: one contract, several ways to compute it. README.md beside it derives the fast ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qies.errors import UserError, nearest
from qies.ops.entangle.chunk import entangle_chunk, readable
from qies.ops.entangle.fla import entangle_fla, obstacle
from qies.ops.entangle.naive import entangle_naive, working_dtype
from qies.ops.entangle.step import entangle_step

__all__ = ["BACKENDS", "MODES", "entangle", "entangle_chunk", "entangle_fla", "entangle_naive", "entangle_step"]

BACKENDS = ("auto", "naive", "chunk", "fused", "step", "fla")
MODES = ("real", "complex")


def entangle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_alpha: Tensor,
    theta: Tensor | None,
    *,
    state: Tensor | None = None,
    mode: str = "real",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Write a sequence into the entangled state Psi in C^{m x V} and read it out.

    Each token t, in this order: Psi <- diag(e^{i theta}) Psi; Psi <- alpha Psi; Psi <- (I - beta k k^H) Psi;
    Psi <- Psi + beta k v^T; then o = q^H Psi. In `mode="real"` the projector k k^H is that of the real pair,
    kappa kappa^T with kappa = [Re k | Im k], v is real and o is the real part.

    Args:
        q, k: `[B, T, H, 2m]`, pairs `[Re | Im]`; brought to unit length here (a zero vector stays zero).
        v: `[B, T, H, V]`; in complex mode `[B, T, H, 2V]`, pairs.
        beta: `[B, T, H]`, in [0, 2]; in complex mode also `[B, T, H, 2]`, a pair with |1 - beta| <= 1.
        log_alpha: `[B, T, H]` or `[B, T, H, m]` (one per complex key channel), natural log of alpha, <= 0.
        theta: `[B, T, H, m]` radians of any size, or None for no phase.
        state: Psi before the first token, `[B, H, 2m, V]`, rows Re | Im; V counts complex channels in complex
            mode. None is zero.
        mode: "real" or "complex".
        backend: "naive" (the recurrence); "chunk" (parallel inside chunks, any device and dtype); "fused" (the same as
            one kernel for the CPU, in float32); "fla" (CUDA kernels of flash-linear-attention, in half precision);
            "step" (T = 1 only); "auto" (for T = 1 "step"; else "fla" or "fused" where they can; else "chunk").

    Returns:
        o, shaped and typed like v; and the state after the last token, in float64 when an input is, else
        float32. Differentiable in every tensor argument, by "fused" and "fla" once.

    Raises:
        UserError: shapes that do not fit, an unknown mode or backend, a backend that cannot do this.
    """
    _check(q, k, v, beta, log_alpha, theta, state, mode, backend)
    inputs = (q, k, v, beta, log_alpha, theta, state)
    if q.shape[1] == 0:  # no token, nothing happens
        if state is None:
            state = v.new_zeros(len(q), *q.shape[2:], v.shape[-1] // (2 if mode == "complex" else 1))
        return v.clone(), state.to(working_dtype(*inputs), copy=True)
    if backend == "auto":
        fast = "fla" if obstacle(*inputs) is None else "fused" if _fits_kernel(*inputs) else "chunk"
        backend = "step" if q.shape[1] == 1 else fast
    if backend == "fused":
        from qies.ops.entangle.fused import entangle_fused  # numba is imported when it is needed

        return entangle_fused(*inputs, mode)
    run = {"naive": entangle_naive, "chunk": entangle_chunk, "step": entangle_step, "fla": entangle_fla}[backend]
    return run(*inputs, mode)


def _fits_kernel(*inputs: Any) -> bool:
    """Whether the kernel takes these: memory of the CPU, and nothing to be done in float64."""
    given = [x for x in inputs if x is not None]
    on_cpu = all(x.device.type == "cpu" for x in given)
    return on_cpu and working_dtype(*given) == torch.float32 and readable(*given)


def _check(q, k, v, beta, log_alpha, theta, state, mode, backend) -> None:
    if mode not in MODES:
        raise UserError(f"mode '{mode}' is unknown; use one of {', '.join(MODES)}.{nearest(mode, MODES)}")
    if backend not in BACKENDS:
        raise UserError(f"backend '{backend}' is not available; use one of {', '.join(BACKENDS)}.")
    if q.ndim != 4 or q.shape[-1] % 2:
        raise UserError(f"q must be [B, T, H, 2m] with an even last axis; got {list(q.shape)}.")
    B, T, H, K = q.shape
    if v.ndim != 4 or (mode == "complex" and v.shape[-1] % 2):
        raise UserError(f"v must be [B, T, H, V], in complex mode [B, T, H, 2V]; got {list(v.shape)}.")
    V = v.shape[-1] // (2 if mode == "complex" else 1)
    heads, channels = (B, T, H), (B, T, H, K // 2)
    allowed = {
        "k": (k, [(B, T, H, K)]),
        "v": (v, [(B, T, H, v.shape[-1])]),
        "beta": (beta, [heads, (*heads, 2)] if mode == "complex" else [heads]),
        "log_alpha": (log_alpha, [heads, channels]),
        "theta": (theta, [channels]),
        "state": (state, [(B, H, K, V)]),
    }
    for name, (x, shapes) in allowed.items():
        if x is not None and tuple(x.shape) not in shapes:
            expected = " or ".join(str(list(s)) for s in shapes)
            raise UserError(f"{name} is {list(x.shape)} but with q {list(q.shape)} it must be {expected}; reshape it.")
    if backend == "fused" and q.device.type != "cpu":
        raise UserError(f"backend 'fused' runs on the CPU but q is on {q.device}; use backend='auto'.")
    if backend == "step" and T != 1:
        raise UserError(f"backend 'step' advances one token but T = {T}; use backend='auto'.")
