"""The arithmetic of one chunk of one head, backward. ../README.md derives the formulas.

Legend: x the workspace, one float32 array; t the offsets of the buffers in it (`Buffers`); s the sizes of the call
(`Sizes`); chunk the batch row b, head h, first token and number of tokens (`Chunk`); K = 2m and V of the op; r key rows
per token (1 real, 2 complex); n rows in use of the MAX_ROWS of a chunk. Buffers are padded to whole vectors of k and v
numbers; sums never run over padding.
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
    """What a state S, `states[at:]` with rows of `row` numbers, and its gradient G add to the gradients of decay and
    phase: <G, S> `[m]` and <G, JS> `[m]`, as token i's damps and spins."""
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
def chunk_gradients(x, t, s, do, dv, chunk):
    """dv; the rows dq, dk, dw; and G before the chunk from G after it (both at the chunk's scale)."""
    n, K, one = chunk.tokens * s.r, 2 * s.m, np.float32(1)
    rows = -(-n // ROWS) * ROWS
    columns = LANES if n <= LANES else MAX_ROWS
    load_rows(x, t.outs, s, do, chunk)
    for i in range(n * s.v, rows * s.v):
        put(x, t.outs + i, np.float32(0))
    gemm(x, t.D, s.v, t.P, 1, MAX_ROWS, t.outs, s.v, rows, s.v, n, one, False, UPPER)
    gemm(x, t.D, s.v, t.w, s.k, 1, t.G, s.v, rows, s.v, K, one, True, FULL)
    substitute_back(x, t.D, t.A, MAX_ROWS, rows, s.v)
    store_rows(x, t.D, s, dv, chunk)
    transpose(x, t.Et, MAX_ROWS, t.E, s.v, MAX_ROWS, s.v)
    transpose(x, t.St, s.k, t.S, s.v, s.k, s.v)
    gemm(x, t.MP, MAX_ROWS, t.outs, s.v, 1, t.Et, MAX_ROWS, rows, columns, s.V, one, False, FULL)
    gemm(x, t.MA, MAX_ROWS, t.D, s.v, 1, t.Et, MAX_ROWS, rows, columns, s.V, -one, False, FULL)
    mask_future(x, t.MP, rows, s.r, s.r)
    mask_future(x, t.MA, rows, s.r, 0)
    gemm(x, t.dq, s.k, t.outs, s.v, 1, t.St, s.k, rows, s.k, s.V, one, False, FULL)
    gemm(x, t.dq, s.k, t.MP, MAX_ROWS, 1, t.w, s.k, rows, s.k, n, one, True, LOWER)
    gemm(x, t.dk, s.k, t.D, s.v, 1, t.St, s.k, rows, s.k, s.V, -one, False, FULL)
    gemm(x, t.dk, s.k, t.MA, MAX_ROWS, 1, t.w, s.k, rows, s.k, n, one, True, LOWER)
    gemm(x, t.dwt, MAX_ROWS, t.G, s.v, 1, t.Et, MAX_ROWS, s.k, columns, s.V, one, False, FULL)
    gemm(x, t.dwt, MAX_ROWS, t.q, 1, s.k, t.MP, MAX_ROWS, s.k, columns, n, one, True, FULL)
    gemm(x, t.dwt, MAX_ROWS, t.k, 1, s.k, t.MA, MAX_ROWS, s.k, columns, n, one, True, FULL)
    transpose(x, t.dw, s.k, t.dwt, MAX_ROWS, s.k, MAX_ROWS)
    gemm(x, t.G, s.v, t.q, 1, s.k, t.outs, s.v, s.k, s.v, n, one, True, FULL)
    gemm(x, t.G, s.v, t.k, 1, s.k, t.D, s.v, s.k, s.v, n, -one, True, FULL)


@njit(**OPTIONS)
def write_gradients(x, t, s, beta, dbeta, chunk):
    """dbeta; dk through w = beta k, added to dk; and each token's term of the gradient of its decay."""
    m = s.m
    for i in range(chunk.tokens):
        row, undo, damps = i * s.r * s.k, t.undo + i * s.k, t.damps + i * m
        q, k, w, dq, dk, dw = t.q + row, t.k + row, t.w + row, t.dq + row, t.dk + row, t.dw + row
        if s.r == 2:
            merge_rows(x, dq, s.k, m)
            merge_rows(x, dk, s.k, m)
            merge_rows(x, dw, s.k, m)
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
    """The gradients of the raw queries (which = 0) or keys (1); and each token's term of the gradient of its phase."""
    m = s.m
    for i in range(chunk.tokens):
        z, dz, spins, reads, undo = rows + i * s.r * s.k, drows + i * s.r * s.k, t.spins + i * m, t.reads, t.undo
        inside = np.float32(0)
        for c in range(2 * m):
            inside += get(x, z + c) * get(x, dz + c)
        if s.phases:
            for c in range(m):
                spin = get(x, z + m + c) * get(x, dz + c) - get(x, z + c) * get(x, dz + m + c)
                put(x, spins + c, spin + get(x, spins + c) if which else spin)
        norm = get(x, t.norm + which * MAX_ROWS + i)
        for c in range(2 * m):
            aside = get(x, dz + c) - get(x, z + c) * (inside * get(x, undo + i * s.k + c))
            put(x, dz + c, aside * (norm * get(x, reads + i * s.k + c)))
        if s.phases:
            rotate(x, dz, t.cos + i * m, t.sin + i * m, np.float32(1), m)
        at = token(s, chunk, i) * 2 * m
        for c in range(2 * m):
            write(out, at + c, get(x, dz + c))


@njit(**OPTIONS)
def gate_gradients(x, t, s, dlog_alpha, dtheta, chunk):
    """The gradients of decays and phases: reverse cumulative sums of the tokens' terms.

    The first token's decay and phase act on the state alone: its gradient is that of the state, without cancellation.
    """
    m = s.m
    for i in range(chunk.tokens - 1, -1, -1):
        number, damps, spins = token(s, chunk, i), t.damps + i * m, t.spins + i * m
        if i == 0:
            state_terms(x, t, s, 0, x, t.S, s.v)
        else:
            for c in range(m):
                put(x, damps + c, get(x, damps + c) + get(x, damps + m + c))
            for c in range(m):
                put(x, spins + c, get(x, spins + c) + get(x, spins + m + c))
        if s.phases:
            for c in range(m):
                write(dtheta, number * m + c, get(x, spins + c))
        if s.decays == 1:
            total = np.float32(0)
            for c in range(m):
                total += get(x, damps + c)
            write(dlog_alpha, number, total)
        else:
            for c in range(m):
                write(dlog_alpha, number * m + c, get(x, damps + c))
