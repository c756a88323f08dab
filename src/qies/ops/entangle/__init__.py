"""The entanglement op: one contract, several implementations. README.md in this folder derives the fast ones."""

from __future__ import annotations

import torch
from torch import Tensor

from qies.errors import UserError, unknown
from qies.ops.autograd import transformed
from qies.ops.entangle.chunk import entangle_chunk
from qies.ops.entangle.fla import entangle_fla, obstacle
from qies.ops.entangle.layout import Inputs, first_tokens, readable, reset_at
from qies.ops.entangle.naive import empty_state, entangle_naive
from qies.ops.entangle.step import entangle_step

__all__ = ["BACKENDS", "MODES", "Inputs", "entangle", "evolve", "first_tokens"]

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
    texts: Tensor | None = None,
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
            "step" (T = 1 only); "auto" (for T = 1 "step", on the CPU without a gradient as one kernel; else "fla" or
            "fused" where they can; else "chunk").
        texts: `[B, T]`, a number for each token, equal within a text and different in neighbouring ones: rows of packed
            texts. Each starts from `state`, and the state returned is the last one's. None: a row is one text.

    Returns:
        o, shaped and typed like v; and the state after the last token, in float64 when an input is, else
        float32. Differentiable in every tensor argument, by "fused" and "fla" once.

    Raises:
        UserError: shapes that do not fit, an unknown mode or backend, a backend that cannot do this; beta or log_alpha
            out of their range, where they lie on the CPU and can be read (not in a compiled model, an export or a
            transform of torch.func).
    """
    _check(q, k, v, beta, log_alpha, theta, state, mode, backend, texts)
    _check_ranges(beta, log_alpha)
    return evolve(Inputs(q, k, v, beta, log_alpha, theta, state), mode, backend, texts)


def evolve(x: Inputs, mode: str = "real", backend: str = "auto", texts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`entangle` of arguments that are known to fit, as a model's are."""
    if x.q.shape[1] == 0:  # no token: the state is unchanged
        return x.v.clone(), empty_state(x, mode) if x.state is None else x.state.to(x.dtype, copy=True)
    if texts is not None:
        if x.state is not None:
            return _one_row_per_text(x, mode, backend, texts)
        x = x._replace(log_alpha=reset_at(x.log_alpha, first_tokens(texts)))
    if backend == "auto" and isinstance(x.q.shape[1], torch.SymInt) and torch.compiler.is_exporting():
        return of_any_length(*x, mode)  # a loop over chunks would fix their number
    if backend == "auto" and x.q.shape[1] == 1:
        if _fits_kernel(x) and not (torch.is_grad_enabled() and any(y.requires_grad for y in x.given)):
            from qies.ops.entangle.cpu.step import entangle_step_fused

            return entangle_step_fused(x, mode)
        backend = "step"
    elif backend == "auto":
        backend = "fla" if obstacle(x) is None else "fused" if _fits_kernel(x) else "chunk"
    if backend == "fused":
        from qies.ops.entangle.cpu import entangle_fused  # imports numba only where it is used

        return entangle_fused(x, mode)
    run = {"naive": entangle_naive, "chunk": entangle_chunk, "step": entangle_step, "fla": entangle_fla}[backend]
    return run(x, mode)


# The op as one node of an exported program whose text may have any length: a loop over chunks would be unrolled for the
# length of the example. The node runs the fastest form of the machine that runs the program; import this module before
# loading a saved program. It has no gradient.
_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor log_alpha, Tensor? theta, Tensor? state, str mode)"
    " -> (Tensor, Tensor)"
)


@torch.library.custom_op("qies::entangle", mutates_args=(), schema=_SCHEMA)
def of_any_length(q, k, v, beta, log_alpha, theta, state, mode):
    """`entangle` of arguments that are known to fit; same shapes and returns."""
    return evolve(Inputs(q, k, v, beta, log_alpha, theta, state), mode)


@of_any_length.register_fake
def _shapes(q, k, v, beta, log_alpha, theta, state, mode) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), empty_state(Inputs(q, k, v, beta, log_alpha, theta, state), mode)


def _fits_kernel(x: Inputs) -> bool:
    """Whether the kernel takes these: memory of the CPU, and nothing to be done in float64."""
    on_cpu = all(y.device.type == "cpu" for y in x.given)
    return on_cpu and x.dtype == torch.float32 and readable(*x.given) and not transformed()


def _one_row_per_text(x: Inputs, mode: str, backend: str, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Packed texts that start from a state: each in its own row, padded at the end by tokens that change nothing."""
    first = first_tokens(texts)
    first[:, 0] = True
    number = first.flatten().cumsum(0) - 1  # of each token's text, over all rows
    begin = first.flatten().nonzero().squeeze(1)
    place = torch.arange(len(number), device=texts.device) - begin[number]
    longest = int(place.max()) + 1

    def rows(y: Tensor | None) -> Tensor | None:
        if y is None:
            return None
        return y.new_zeros(len(begin), longest, *y.shape[2:]).index_put((number, place), y.flatten(0, 1))

    state = x.state[begin // texts.shape[1]]  # type: ignore[index]
    o, last = evolve(Inputs(*map(rows, x[:-1]), state), mode, backend)  # type: ignore[arg-type,call-arg]
    return o[number, place].view(x.v.shape), last[number.view_as(texts)[:, -1]]


def _check_ranges(beta: Tensor, log_alpha: Tensor) -> None:
    """Raise UserError for a beta or log_alpha out of its range; a NaN is let through."""
    if transformed() or torch.compiler.is_compiling() or not readable(beta, log_alpha) or beta.numel() == 0:
        return
    if beta.device.type != "cpu" or log_alpha.device.type != "cpu":  # a look would wait for the device
        return
    slack = 4 * torch.finfo(beta.dtype).eps
    given = beta.detach()
    if beta.ndim == 3:
        low, high = given.aminmax()
        if low < -slack or high > 2 + slack:
            raise UserError(f"beta must lie in [0, 2] but spans [{low:.3g}, {high:.3g}]; clamp it, or use a sigmoid.")
    elif (radius := torch.hypot(1 - given[..., 0], given[..., 1]).max()) > 1 + slack:
        raise UserError(f"a complex beta must have |1 - beta| <= 1 but it reaches {radius:.3g}; scale 1 - beta.")
    if (largest := log_alpha.detach().max()) > 0:
        raise UserError(f"log_alpha must be <= 0 but reaches {largest:.3g}; it is the logarithm of alpha, at most 1.")


def _check(q, k, v, beta, log_alpha, theta, state, mode, backend, texts) -> None:
    for name, x in {"q": q, "k": k, "v": v, "beta": beta, "log_alpha": log_alpha}.items():
        if not isinstance(x, Tensor):
            hint = "; without damping give zeros" if name == "log_alpha" else ""
            raise UserError(f"{name} must be a tensor, not {type(x).__name__}{hint}.")
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
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
        "texts": (texts, [(B, T)]),
    }
    for name, (x, shapes) in allowed.items():
        if x is not None and tuple(x.shape) not in shapes:
            expected = " or ".join(str(list(s)) for s in shapes)
            raise UserError(f"{name} is {list(x.shape)} but with q {list(q.shape)} it must be {expected}; reshape it.")
    if backend == "fused" and q.device.type != "cpu":
        raise UserError(f"backend 'fused' runs on the CPU but q is on {q.device}; use backend='auto'.")
    if backend == "step" and T != 1:
        raise UserError(f"backend 'step' advances one token but T = {T}; use backend='auto'.")
