"""One token on the CPU as one kernel: the recurrence of ../naive.py for T = 1, without a gradient."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qies.ops.compiled import OPTIONS, kernel
from qies.ops.entangle.cpu.workspace import Arrays, Sizes
from qies.ops.entangle.layout import Inputs
from qies.ops.simd import cos_sin, exp, flat, read, working, write


@torch.compiler.disable
def entangle_step_fused(x: Inputs, mode: str = "real") -> tuple[Tensor, Tensor]:
    """`entangle` for T = 1 on the CPU, computed in float32 for every input dtype; same shapes and returns."""
    if x.q.dtype != x.k.dtype:
        x = x._replace(q=x.q.float(), k=x.k.float())
    B, _, H, K = x.q.shape
    r = 1 if mode == "real" else 2
    V = x.v.shape[-1] // r
    decays, betas = (1 if y.ndim == 3 else y.shape[-1] for y in (x.log_alpha, x.beta))
    sizes = Sizes(1, H, K // 2, V, r, decays, betas, x.theta is not None, K, V)
    before = torch.zeros(B, H, K, V) if x.state is None else x.state.float()
    state = before.clone(memory_format=torch.contiguous_format)
    o = torch.empty(x.v.shape, dtype=working(x.v))
    one_token(Arrays(*map(flat, x[:6])), flat(state), flat(o), sizes, B * H)
    return o.to(x.v.dtype), state


@kernel
def one_token(inputs, state, o, s, units):
    """Advance the states `[units, 2m, V]` in place by one token each, and read them into o."""
    K, V = 2 * s.m, s.V
    k, q = np.empty((s.r, K), np.float32), np.empty((s.r, K), np.float32)
    e = np.empty((s.r, V), np.float32)
    for unit in range(units):
        rows_along(k, inputs.k, unit * K, s)
        rows_along(q, inputs.q, unit * K, s)
        first = unit * K * V
        evolve_and_damp(state, first, inputs, unit, s)
        for i in range(s.r):
            for j in range(V):
                e[i, j] = read(inputs.v, (unit * s.r + i) * V + j)
        for c in range(K):  # what measuring takes away
            row = first + c * V
            for i in range(s.r):
                for j in range(V):
                    e[i, j] -= k[i, c] * state[row + j]
        re = read(inputs.beta, unit * s.betas)
        im = read(inputs.beta, unit * s.betas + 1) if s.betas == 2 else np.float32(0)
        for j in range(V):
            if s.r == 2:
                e[0, j], e[1, j] = re * e[0, j] - im * e[1, j], re * e[1, j] + im * e[0, j]
            else:
                e[0, j] *= re
        for c in range(K):  # what is created
            row = first + c * V
            for i in range(s.r):
                for j in range(V):
                    state[row + j] += k[i, c] * e[i, j]
        e[:] = 0
        for c in range(K):
            row = first + c * V
            for i in range(s.r):
                for j in range(V):
                    e[i, j] += q[i, c] * state[row + j]
        for i in range(s.r):
            for j in range(V):
                write(o, (unit * s.r + i) * V + j, e[i, j])


@njit(**OPTIONS)
def rows_along(x, source, at, s):
    """The unit vector at `source[at:]`, and in complex mode J times it, as the rows of x `[r, 2m]`."""
    square = np.float64(0)
    for c in range(2 * s.m):
        value = np.float64(read(source, at + c))
        square += value * value
    norm = 1 / np.sqrt(square) if square > 0 else np.float64(0)
    for c in range(2 * s.m):
        x[0, c] = np.float64(read(source, at + c)) * norm
    if s.r == 2:
        for c in range(s.m):
            x[1, c], x[1, s.m + c] = -x[0, s.m + c], x[0, c]


@njit(**OPTIONS)
def evolve_and_damp(state, first, inputs, unit, s):
    """Multiply the channels of a state by alpha e^{i theta}."""
    for c in range(s.m):
        alpha = exp(read(inputs.log_alpha, unit * s.decays + (c if s.decays > 1 else 0)))
        re, im = first + c * s.V, first + (s.m + c) * s.V
        if s.has_phase:
            turn = np.float64(read(inputs.theta, unit * s.m + c)) * (0.5 / np.pi)
            cos, sin = cos_sin(turn - np.floor(turn))
            cos, sin = cos * alpha, sin * alpha
            for j in range(s.V):
                x, y = state[re + j], state[im + j]
                state[re + j], state[im + j] = x * cos - y * sin, x * sin + y * cos
        else:
            for j in range(s.V):
                state[re + j] *= alpha
                state[im + j] *= alpha
