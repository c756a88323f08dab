"""The entanglement op: one contract, four ways to compute it. README.md beside it derives the fast ones."""

from __future__ import annotations

from torch import Tensor

from qies.errors import UserError, nearest
from qies.ops.entangle.chunk import entangle_chunk
from qies.ops.entangle.fla import entangle_fla, obstacle
from qies.ops.entangle.naive import entangle_naive
from qies.ops.entangle.step import entangle_step

__all__ = ["BACKENDS", "MODES", "entangle", "entangle_chunk", "entangle_fla", "entangle_naive", "entangle_step"]

BACKENDS = ("auto", "naive", "chunk", "step", "fla")
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
        backend: "naive" (the recurrence), "chunk" (parallel inside chunks), "step" (T = 1 only),
            "fla" (CUDA kernels of flash-linear-attention, in half precision), "auto" (for T = 1 "step"; else "fla"
            where half precision is asked for, the package is there and expresses the case; else "chunk").

    Returns:
        o, shaped and typed like v; and the state after the last token, in float64 when an input is, else
        float32. Differentiable in every tensor argument, by "chunk" and "fla" once.

    Raises:
        UserError: shapes that do not fit, an empty sequence, an unknown mode or backend, a backend that cannot do this.
    """
    _check(q, k, v, beta, log_alpha, theta, state, mode, backend)
    inputs = (q, k, v, beta, log_alpha, theta, state)
    if backend == "auto":
        backend = "step" if q.shape[1] == 1 else "chunk" if obstacle(*inputs) else "fla"
    run = {"naive": entangle_naive, "chunk": entangle_chunk, "step": entangle_step, "fla": entangle_fla}[backend]
    return run(*inputs, mode)


def _check(q, k, v, beta, log_alpha, theta, state, mode, backend) -> None:
    if mode not in MODES:
        raise UserError(f"mode '{mode}' is unknown; use one of {', '.join(MODES)}.{nearest(mode, MODES)}")
    if backend not in BACKENDS:
        raise UserError(f"backend '{backend}' is not available; use one of {', '.join(BACKENDS)}.")
    if q.ndim != 4 or q.shape[-1] % 2 or q.shape[1] == 0:
        raise UserError(f"q must be [B, T, H, 2m] with T >= 1 and an even last axis; got {list(q.shape)}.")
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
    if backend == "step" and T != 1:
        raise UserError(f"backend 'step' advances one token but T = {T}; use backend='auto'.")
