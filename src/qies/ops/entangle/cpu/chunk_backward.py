"""The arithmetic of one chunk of one head, backward. ../README.md derives the formulas.

Legend: see workspace.py.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from qies.ops.compiled import OPTIONS
from qies.ops.entangle.cpu.workspace import MAX_ROWS, load_rows, mask_future, merge_rows, rotate, store_rows, token
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
def state_terms(x, t, s, i, states, at, row):
    """The terms of a state S and its gradient G in the gradients of decay and phase, <G, S> `[m]` and <G, JS> `[m]`.

    They are stored as token i's `decay_terms` and `phase_terms`. S starts at `states[at]`; its rows have `row` numbers.
    """
    for c in range(s.m):
        re, im = at + c * row, at + (c + s.m) * row
        dre, dim = t.G + c * s.v, t.G + (c + s.m) * s.v
        decay, phase = np.float32(0), np.float32(0)
        for j in range(s.V):
            decay += get(states, re + j) * get(x, dre + j) + get(states, im + j) * get(x, dim + j)
            phase += get(states, re + j) * get(x, dim + j) - get(states, im + j) * get(x, dre + j)
        put(x, t.decay_terms + i * s.m + c, decay)
        put(x, t.phase_terms + i * s.m + c, phase)


@njit(**OPTIONS)
def chunk_gradients(x, t, s, do, dv, chunk):
    """Compute dv, the rows dq, dk, dw, and G before the chunk from G after it (both at the chunk's scale)."""
    n, K, one = chunk.tokens * s.r, 2 * s.m, np.float32(1)
    rows = -(-n // ROWS) * ROWS
    columns = LANES if n <= LANES else MAX_ROWS
    load_rows(x, t.do, s, do, chunk)
    for i in range(n * s.v, rows * s.v):
        put(x, t.do + i, np.float32(0))
    gemm(x, t.D, s.v, t.P, 1, MAX_ROWS, t.do, s.v, rows, s.v, n, one, False, UPPER)
    gemm(x, t.D, s.v, t.w, s.k, 1, t.G, s.v, rows, s.v, K, one, True, FULL)
    substitute_back(x, t.D, t.A, MAX_ROWS, rows, s.v)
    store_rows(x, t.D, s, dv, chunk)
    transpose(x, t.Et, MAX_ROWS, t.E, s.v, MAX_ROWS, s.v)
    transpose(x, t.St, s.k, t.S, s.v, s.k, s.v)
    gemm(x, t.dP, MAX_ROWS, t.do, s.v, 1, t.Et, MAX_ROWS, rows, columns, s.V, one, False, FULL)
    gemm(x, t.dA, MAX_ROWS, t.D, s.v, 1, t.Et, MAX_ROWS, rows, columns, s.V, -one, False, FULL)
    mask_future(x, t.dP, rows, s.r, s.r)
    mask_future(x, t.dA, rows, s.r, 0)
    gemm(x, t.dq, s.k, t.do, s.v, 1, t.St, s.k, rows, s.k, s.V, one, False, FULL)
    gemm(x, t.dq, s.k, t.dP, MAX_ROWS, 1, t.w, s.k, rows, s.k, n, one, True, LOWER)
    gemm(x, t.dk, s.k, t.D, s.v, 1, t.St, s.k, rows, s.k, s.V, -one, False, FULL)
    gemm(x, t.dk, s.k, t.dA, MAX_ROWS, 1, t.w, s.k, rows, s.k, n, one, True, LOWER)
    gemm(x, t.dwt, MAX_ROWS, t.G, s.v, 1, t.Et, MAX_ROWS, s.k, columns, s.V, one, False, FULL)
    gemm(x, t.dwt, MAX_ROWS, t.q, 1, s.k, t.dP, MAX_ROWS, s.k, columns, n, one, True, FULL)
    gemm(x, t.dwt, MAX_ROWS, t.k, 1, s.k, t.dA, MAX_ROWS, s.k, columns, n, one, True, FULL)
    transpose(x, t.dw, s.k, t.dwt, MAX_ROWS, s.k, MAX_ROWS)
    gemm(x, t.G, s.v, t.q, 1, s.k, t.do, s.v, s.k, s.v, n, one, True, FULL)
    gemm(x, t.G, s.v, t.k, 1, s.k, t.D, s.v, s.k, s.v, n, -one, True, FULL)


@njit(**OPTIONS)
def write_gradients(x, t, s, beta, dbeta, chunk):
    """Compute dbeta and each token's `decay_terms`, and add to dk the gradient through w = beta k."""
    m = s.m
    for i in range(chunk.tokens):
        row, read_to_write, decay_terms = i * s.r * s.k, t.read_to_write + i * s.k, t.decay_terms + i * m
        q, k, w, dq, dk, dw = t.q + row, t.k + row, t.w + row, t.dq + row, t.dk + row, t.dw + row
        if s.r == 2:
            merge_rows(x, dq, s.k, m)
            merge_rows(x, dk, s.k, m)
            merge_rows(x, dw, s.k, m)
        for c in range(m):
            put(x, decay_terms + c, get(x, q + c) * get(x, dq + c) + get(x, k + c) * get(x, dk + c))
        for c in range(m):
            gain = get(x, q + m + c) * get(x, dq + m + c) + get(x, k + m + c) * get(x, dk + m + c)
            put(x, decay_terms + c, get(x, decay_terms + c) + gain)
        for c in range(m):
            loss = get(x, w + c) * get(x, dw + c) + get(x, w + m + c) * get(x, dw + m + c)
            put(x, decay_terms + c, get(x, decay_terms + c) - loss)
        for c in range(2 * m):
            put(x, dw + c, get(x, dw + c) * get(x, read_to_write + c))
        at = token(s, chunk, i) * s.betas
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
def input_gradients(x, t, s, rows, drows, out, which, chunk):
    """Compute the gradients of the raw queries (which = 0) or keys (which = 1), and each token's `phase_terms`."""
    m = s.m
    for i in range(chunk.tokens):
        z, dz, phase_terms = rows + i * s.r * s.k, drows + i * s.r * s.k, t.phase_terms + i * m
        read_scale, read_to_write = t.read_scale + i * s.k, t.read_to_write + i * s.k
        parallel = np.float32(0)
        for c in range(2 * m):
            parallel += get(x, z + c) * get(x, dz + c)
        if s.has_phase:
            for c in range(m):
                phase = get(x, z + m + c) * get(x, dz + c) - get(x, z + c) * get(x, dz + m + c)
                put(x, phase_terms + c, phase + get(x, phase_terms + c) if which else phase)
        norm = get(x, t.norm + which * MAX_ROWS + i)
        for c in range(2 * m):
            orthogonal = get(x, dz + c) - get(x, z + c) * (parallel * get(x, read_to_write + c))
            put(x, dz + c, orthogonal * (norm * get(x, read_scale + c)))
        if s.has_phase:
            rotate(x, dz, t.cos + i * m, t.sin + i * m, np.float32(1), m)
        at = token(s, chunk, i) * 2 * m
        for c in range(2 * m):
            write(out, at + c, get(x, dz + c))


@njit(**OPTIONS)
def gate_gradients(x, t, s, dlog_alpha, dtheta, chunk):
    """Compute the gradients of decays and phases: reverse cumulative sums of the tokens' terms.

    The first token's decay and phase act on the state only, so its gradient is the state's, without cancellation.
    """
    m = s.m
    for i in range(chunk.tokens - 1, -1, -1):
        number, decay_terms, phase_terms = token(s, chunk, i), t.decay_terms + i * m, t.phase_terms + i * m
        if i == 0:
            state_terms(x, t, s, 0, x, t.S, s.v)
        else:
            for c in range(m):
                put(x, decay_terms + c, get(x, decay_terms + c) + get(x, decay_terms + m + c))
            for c in range(m):
                put(x, phase_terms + c, get(x, phase_terms + c) + get(x, phase_terms + m + c))
        if s.has_phase:
            for c in range(m):
                write(dtheta, number * m + c, get(x, phase_terms + c))
        if s.decays == 1:
            total = np.float32(0)
            for c in range(m):
                total += get(x, decay_terms + c)
            write(dlog_alpha, number, total)
        else:
            for c in range(m):
                write(dlog_alpha, number * m + c, get(x, decay_terms + c))
