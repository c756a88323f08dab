"""The arithmetic of one chunk of one head, backward. README.md in the folder above derives the formulas.

Legend: K = 2m and V of the op; r key rows a token (1 real, 2 complex); n rows in use of the RANGE a chunk has. Buffers
are padded to whole vectors of k and v numbers; sums never run over padding.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from qies.ops.compiled import OPTIONS
from qies.ops.entangle.cpu.workspace import RANGE, fold, hand_out, hide, take_in, turn
from qies.ops.simd import (
    FULL,
    LANES,
    LOWER,
    ROWS,
    UPPER,
    gemm,
    get,
    put,
    read,
    substitute_back,
    transpose,
    write,
)


@njit(**OPTIONS)
def through(x, t, s, i, states, at, row):
    """What passes through a state, `states[at:]` with rows of `row`, and its gradient G, as token i's damps and spins:
    <G, S> `[m]` for decays, <G, JS> `[m]` for phases."""
    for c in range(s.m):
        re, im = at + c * row, at + (c + s.m) * row
        dre, dim = t.G + c * s.v, t.G + (c + s.m) * s.v
        damp, spin = np.float32(0), np.float32(0)
        for j in range(s.V):
            damp += get(states, re + j) * get(x, dre + j) + get(states, im + j) * get(x, dim + j)
            spin += get(states, re + j) * get(x, dim + j) - get(states, im + j) * get(x, dre + j)
        put(x, t.damps + i * s.m + c, damp)
        put(x, t.spins + i * s.m + c, spin)


@njit(**OPTIONS)
def pull(x, t, s, do, dv, b, h, start, tokens):
    """dv; dq, dk, dw as rows; and G before the chunk from G after it (both at the chunk's scale)."""
    n, K, one = tokens * s.r, 2 * s.m, np.float32(1)
    rows = -(-n // ROWS) * ROWS
    columns = LANES if n <= LANES else RANGE
    take_in(x, t.outs, s, do, b, h, start, n)
    for i in range(n * s.v, rows * s.v):
        put(x, t.outs + i, np.float32(0))
    gemm(x, t.D, s.v, t.P, 1, RANGE, t.outs, s.v, rows, s.v, n, one, False, UPPER)
    gemm(x, t.D, s.v, t.w, s.k, 1, t.G, s.v, rows, s.v, K, one, True, FULL)
    substitute_back(x, t.D, t.A, RANGE, rows, s.v)
    hand_out(x, t.D, s, dv, b, h, start, n)
    transpose(x, t.Et, RANGE, t.E, s.v, RANGE, s.v)
    transpose(x, t.St, s.k, t.S, s.v, s.k, s.v)
    gemm(x, t.MP, RANGE, t.outs, s.v, 1, t.Et, RANGE, rows, columns, s.V, one, False, FULL)
    gemm(x, t.MA, RANGE, t.D, s.v, 1, t.Et, RANGE, rows, columns, s.V, -one, False, FULL)
    hide(x, t.MP, rows, s.r, s.r)
    hide(x, t.MA, rows, s.r, 0)
    gemm(x, t.dq, s.k, t.outs, s.v, 1, t.St, s.k, rows, s.k, s.V, one, False, FULL)
    gemm(x, t.dq, s.k, t.MP, RANGE, 1, t.w, s.k, rows, s.k, n, one, True, LOWER)
    gemm(x, t.dk, s.k, t.D, s.v, 1, t.St, s.k, rows, s.k, s.V, -one, False, FULL)
    gemm(x, t.dk, s.k, t.MA, RANGE, 1, t.w, s.k, rows, s.k, n, one, True, LOWER)
    gemm(x, t.dwt, RANGE, t.G, s.v, 1, t.Et, RANGE, s.k, columns, s.V, one, False, FULL)
    gemm(x, t.dwt, RANGE, t.q, 1, s.k, t.MP, RANGE, s.k, columns, n, one, True, FULL)
    gemm(x, t.dwt, RANGE, t.k, 1, s.k, t.MA, RANGE, s.k, columns, n, one, True, FULL)
    transpose(x, t.dw, s.k, t.dwt, RANGE, s.k, RANGE)
    gemm(x, t.G, s.v, t.q, 1, s.k, t.outs, s.v, s.k, s.v, n, one, True, FULL)
    gemm(x, t.G, s.v, t.k, 1, s.k, t.D, s.v, s.k, s.v, n, -one, True, FULL)


@njit(**OPTIONS)
def settle(x, t, s, beta, dbeta, b, h, start, tokens):
    """The gradients of writing: dbeta, and into dk what w = beta k gives; and each token's part in the decay's."""
    m = s.m
    for i in range(tokens):
        row, undo, damps = i * s.r * s.k, t.undo + i * s.k, t.damps + i * m
        q, k, w, dq, dk, dw = t.q + row, t.k + row, t.w + row, t.dq + row, t.dk + row, t.dw + row
        if s.r == 2:
            fold(x, dq, s.k, m)
            fold(x, dk, s.k, m)
            fold(x, dw, s.k, m)
        for c in range(m):
            put(x, damps + c, get(x, q + c) * get(x, dq + c) + get(x, k + c) * get(x, dk + c))
        for c in range(m):
            gain = get(x, q + m + c) * get(x, dq + m + c) + get(x, k + m + c) * get(x, dk + m + c)
            put(x, damps + c, get(x, damps + c) + gain)
        for c in range(m):
            loss = get(x, w + c) * get(x, dw + c) + get(x, w + m + c) * get(x, dw + m + c)
            put(x, damps + c, get(x, damps + c) - loss)
        for c in range(2 * m):
            put(x, dw + c, get(x, dw + c) * get(x, undo + c))
        at = ((b * s.T + start + i) * s.H + h) * s.betas
        along_k, along_jk = np.float32(0), np.float32(0)
        for c in range(m):
            own, other = get(x, dw + c), get(x, dw + m + c)
            along_k += get(x, k + c) * own + get(x, k + m + c) * other
            along_jk += get(x, k + c) * other - get(x, k + m + c) * own
        write(dbeta, at, along_k)
        re = read(beta, at)
        if s.betas == 1:
            for c in range(2 * m):
                put(x, dk + c, get(x, dk + c) + re * get(x, dw + c))
        else:
            write(dbeta, at + 1, along_jk)
            im = read(beta, at + 1)
            for c in range(m):
                own, other = get(x, dw + c), get(x, dw + m + c)
                put(x, dk + c, get(x, dk + c) + (re * own + im * other))
                put(x, dk + m + c, get(x, dk + m + c) + (re * other - im * own))


@njit(**OPTIONS)
def turn_back(x, t, s, rows, drows, out, which, b, h, start, tokens):
    """The gradients of the raw queries (which = 0) or keys (1); and each token's part in the phase's."""
    m = s.m
    for i in range(tokens):
        z, dz, spins, reads, undo = rows + i * s.r * s.k, drows + i * s.r * s.k, t.spins + i * m, t.reads, t.undo
        inside = np.float32(0)
        for c in range(2 * m):
            inside += get(x, z + c) * get(x, dz + c)
        if s.phases:
            for c in range(m):
                spin = get(x, z + m + c) * get(x, dz + c) - get(x, z + c) * get(x, dz + m + c)
                put(x, spins + c, spin + get(x, spins + c) if which else spin)
        norm = get(x, t.norm + which * RANGE + i)
        for c in range(2 * m):
            aside = get(x, dz + c) - get(x, z + c) * (inside * get(x, undo + i * s.k + c))
            put(x, dz + c, aside * (norm * get(x, reads + i * s.k + c)))
        if s.phases:
            turn(x, dz, t.cos + i * m, t.sin + i * m, np.float32(1), m)
        at = ((b * s.T + start + i) * s.H + h) * 2 * m
        for c in range(2 * m):
            write(out, at + c, get(x, dz + c))


@njit(**OPTIONS)
def sum_up(x, t, s, dlog_alpha, dtheta, b, h, start, tokens):
    """The gradients of decays and phases: the sums of what each token and all behind it add.

    The first token's act on the state alone: what passes through it is the sum, with nothing to cancel.
    """
    m = s.m
    for i in range(tokens - 1, -1, -1):
        token, damps, spins = (b * s.T + start + i) * s.H + h, t.damps + i * m, t.spins + i * m
        if i == 0:
            through(x, t, s, 0, x, t.S, s.v)
        else:
            for c in range(m):
                put(x, damps + c, get(x, damps + c) + get(x, damps + m + c))
            for c in range(m):
                put(x, spins + c, get(x, spins + c) + get(x, spins + m + c))
        if s.phases:
            for c in range(m):
                write(dtheta, token * m + c, get(x, spins + c))
        if s.decays == 1:
            total = np.float32(0)
            for c in range(m):
                total += get(x, damps + c)
            write(dlog_alpha, token, total)
        else:
            for c in range(m):
                write(dlog_alpha, token * m + c, get(x, damps + c))
