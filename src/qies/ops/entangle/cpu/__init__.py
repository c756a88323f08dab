"""The chunk form as one CPU kernel, compiled by numba; the buffers of a chunk stay in the cache.

../README.md derives the formulas; ../chunk.py is the same form in torch operations.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qies.ops.autograd import first_order
from qies.ops.entangle.cpu.scan import backward, forward, plan
from qies.ops.entangle.cpu.workspace import Arrays, Chunks, Sizes, buffer_layout
from qies.ops.entangle.layout import Inputs
from qies.ops.simd import LANES, flat, working


@torch.compiler.disable  # a compiled model calls it between two compiled pieces
def entangle_fused(x: Inputs, mode: str = "real") -> tuple[Tensor, Tensor]:
    """`entangle` on the CPU, computed in float32 for every input dtype; same shapes and returns. Once differentiable.

    The backward pass saves the state before every 32 key rows (17 at worst, where damping shortens chunks) and no other
    tensor of comparable size.
    """
    if x.q.dtype != x.k.dtype:
        x = x._replace(q=x.q.float(), k=x.k.float())  # the kernel reads them side by side
    keep = torch.is_grad_enabled() and any(y.requires_grad for y in x.given)
    return _Fused.apply(*x, 1 if mode == "real" else 2, keep)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, beta, log_alpha, theta, state, r: int, keep: bool):
        # r: key rows per token, 1 in real mode, 2 in complex mode. kept_states: the states before the sections.
        # kept_phases: the running phase before each chunk, in turns.
        B, T, H, K = q.shape
        m, V = K // 2, v.shape[-1] // r
        decays, betas = (1 if x.ndim == 3 else x.shape[-1] for x in (log_alpha, beta))
        sizes = Sizes(T, H, m, V, r, decays, betas, theta is not None, *(-(-n // LANES) * LANES for n in (K, V)))
        inputs = (q, k, v, beta, log_alpha, theta)
        arrays = Arrays(*map(flat, inputs))
        *parts, count = plan(arrays.log_alpha, sizes, B)
        chunks = Chunks(*parts)
        kept_states, kept_phases = (
            torch.empty(count * K * V if keep else 0, dtype=torch.float32),
            np.empty(len(chunks.starts) * m if keep else 0),
        )
        o = torch.empty(v.shape, dtype=working(v))
        if state is None:
            last = torch.zeros(B, H, K, V, dtype=torch.float32)
        else:
            last = state.float().clone(memory_format=torch.contiguous_format)

        def part(begin: int, end: int) -> None:
            buffers = buffer_layout(sizes.k, sizes.v, m)
            forward(arrays, flat(last), flat(o), sizes, *buffers, begin, end, chunks, flat(kept_states), kept_phases)

        in_parts(part, B * H)
        if keep:
            ctx.save_for_backward(*inputs, kept_states)
            ctx.rest = sizes, chunks, kept_phases, None if state is None else state.dtype
        return o.to(v.dtype), last

    @staticmethod
    @first_order
    def backward(ctx: Any, do: Tensor, dlast: Tensor):
        *inputs, kept_states = ctx.saved_tensors
        sizes, chunks, kept_phases, state_dtype = ctx.rest
        grads = [None if x is None else torch.empty(x.shape, dtype=working(x)) for x in inputs]
        dstate = dlast.float().clone(memory_format=torch.contiguous_format)
        arrays, gradients = Arrays(*map(flat, inputs)), Arrays(*map(flat, grads))
        rest = flat(do), flat(dstate), sizes

        def part(begin: int, end: int) -> None:
            buffers = buffer_layout(sizes.k, sizes.v, sizes.m)
            backward(arrays, gradients, *rest, *buffers, begin, end, chunks, flat(kept_states), kept_phases)

        in_parts(part, len(chunks.first) - 1)
        grads = [g if g is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True)]
        return *grads, None if state_dtype is None else dstate.to(state_dtype), None, None


def in_parts(part: Callable[[int, int], None], units: int) -> None:
    """Call part(begin, end) so that the calls cover all units, on as many threads as torch uses."""
    threads = min(torch.get_num_threads(), units)
    if threads <= 1:
        return part(0, units) if units else None
    edges = [units * i // threads for i in range(threads + 1)]
    for _ in _pool(threads).map(part, edges[:-1], edges[1:]):
        pass  # re-raises the exception of a part


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "entangle")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has the pool but not its threads
