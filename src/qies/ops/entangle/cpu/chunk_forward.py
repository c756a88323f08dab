"""The arithmetic of one chunk of one head, forward. ../README.md derives the formulas.

Legend: x the workspace, one float32 array; t the offsets of the buffers in it (`Buffers`); s the sizes of the call
(`Sizes`); chunk the batch row b, head h, first token and number of tokens (`Chunk`); K = 2m and V of the op; r key rows
per token (1 real, 2 complex); n rows in use of the MAX_ROWS of a chunk. Buffers are padded to whole vectors of k and v
numbers; sums never run over padding.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from qies.ops.compiled import OPTIONS
from qies.ops.entangle.cpu.workspace import (
    MAX_ROWS,
    load_rows,
    mask_future,
    put_times_i,
    rescale,
    rotate,
    store_rows,
    token,
)
from qies.ops.simd import (
    FULL,
    LANES,
    LOWER,
    ROWS,
    cos_sin,
    exp,
    gemm,
    get,
    put,
    read,
    substitute,
    transpose,
)

MAX_GRADIENT_NORM = 1e25  # bounds the gradient through the direction of a tiny vector: float32 overflows at 3e38


@njit(**OPTIONS)
def gates(x, t, s, log_alpha, theta, turns, chunk):
    """Decays and phases of a chunk; `turns` advances.

    With g the running sum of log_alpha without the first token's and c half its last value: reads = e^{g - c}, undo =
    e^{2(c - g)}; enter = e^{c} times the first token's decay, leave = e^{c}.
    """
    K, per = 2 * s.m, s.decays
    step = s.H * per
    at = token(s, chunk, 0) * per
    for i in range(chunk.tokens):
        row = t.reads + i * s.k
        for c in range(per):
            before = get(x, row - s.k + c) + read(log_alpha, at + i * step + c) if i else np.float32(0)
            put(x, row + c, before)
    last = t.reads + (chunk.tokens - 1) * s.k
    for c in range(per):
        put(x, t.leave + c, get(x, last + c) * np.float32(0.5))
    for i in range(chunk.tokens):
        row = t.reads + i * s.k
        for c in range(per):
            value = exp(get(x, row + c) - get(x, t.leave + c))
            put(x, row + c, value)
            put(x, t.undo + i * s.k + c, np.float32(1) / (value * value))
        broadcast_channels(x, row, per, s.m, K)
        broadcast_channels(x, t.undo + i * s.k, per, s.m, K)
    for c in range(per):
        put(x, t.enter + c, exp(get(x, t.leave + c) + read(log_alpha, at + c)))
        put(x, t.leave + c, exp(get(x, t.leave + c)))
    broadcast_channels(x, t.enter, per, s.m, K)
    broadcast_channels(x, t.leave, per, s.m, K)
    if s.phases:
        for i in range(chunk.tokens):
            at = token(s, chunk, i) * s.m
            for c in range(s.m):
                turn = turns[c] + np.float64(read(theta, at + c)) * (0.5 / np.pi)
                turn -= np.floor(turn)
                turns[c] = turn
                cos, sin = cos_sin(turn)
                put(x, t.cos + i * s.m + c, cos)
                put(x, t.sin + i * s.m + c, sin)


@njit(**OPTIONS)
def broadcast_channels(x, row, per, m, K):
    """Broadcast one value, or one per complex channel, over the 2m real channels of a row."""
    if per == 1:
        value = get(x, row)
        for c in range(K):
            put(x, row + c, value)
    else:
        for c in range(m):
            put(x, row + m + c, get(x, row + c))


@njit(**OPTIONS)
def load(x, t, s, rows, source, which, chunk):
    """The rows of a chunk's queries (which = 0) or keys (1): normalised, rotated by the negative phase and rescaled."""
    K = 2 * s.m
    for i in range(chunk.tokens):
        row, at = rows + i * s.r * s.k, token(s, chunk, i) * K
        square = np.float64(0)
        for c in range(K):
            value = np.float64(read(source, at + c))
            square += value * value
        # in float64: equal small errors in every key's length would add up over a long sequence of reflections
        norm = 1 / np.sqrt(square) if square > 0 else np.float64(0)
        put(x, t.norm + which * MAX_ROWS + i, np.float32(min(norm, MAX_GRADIENT_NORM)))
        reads = t.reads + i * s.k
        for c in range(K):
            put(x, row + c, np.float32(np.float64(read(source, at + c)) * (norm * np.float64(get(x, reads + c)))))
        if s.phases:
            rotate(x, row, t.cos + i * s.m, t.sin + i * s.m, np.float32(-1), s.m)
        if s.r == 2:
            put_times_i(x, row, s.k, s.m)


@njit(**OPTIONS)
def write_rows(x, t, s, beta, chunk):
    """The rows of writes, w = beta k, from the rows k; `undo` converts the scale of reads to that of writes."""
    m = s.m
    for i in range(chunk.tokens):
        row, undo, at = i * s.r * s.k, t.undo + i * s.k, token(s, chunk, i) * s.betas
        w, k, re = t.w + row, t.k + row, read(beta, at)
        if s.betas == 1:
            for c in range(2 * m):
                put(x, w + c, get(x, k + c) * (re * get(x, undo + c)))
        else:
            im = read(beta, at + 1)
            for c in range(m):
                own, other, scale = get(x, k + c), get(x, k + m + c), get(x, undo + c)
                put(x, w + c, (re * own - im * other) * scale)
                put(x, w + m + c, (re * other + im * own) * scale)
        if s.r == 2:
            put_times_i(x, w, s.k, m)


@njit(**OPTIONS)
def prepare(x, t, s, inputs, turns, chunk):
    """Compute q, k, w, A, P and the values written, E, of a chunk with the state S before it, which is rescaled."""
    K, n = 2 * s.m, chunk.tokens * s.r
    rows = -(-n // ROWS) * ROWS
    gates(x, t, s, inputs.log_alpha, inputs.theta, turns, chunk)
    load(x, t, s, t.q, inputs.q, 0, chunk)
    load(x, t, s, t.k, inputs.k, 1, chunk)
    write_rows(x, t, s, inputs.beta, chunk)
    load_rows(x, t.E, s, inputs.v, chunk)
    for i in range(n * s.k, rows * s.k):
        put(x, t.q + i, np.float32(0))
        put(x, t.k + i, np.float32(0))
        put(x, t.w + i, np.float32(0))
    for i in range(n * s.v, rows * s.v):
        put(x, t.E + i, np.float32(0))
    rescale(x, t.S, t.enter, s)
    transpose(x, t.wt, MAX_ROWS, t.w, s.k, MAX_ROWS, s.k)
    columns = LANES if n <= LANES else MAX_ROWS
    gemm(x, t.P, MAX_ROWS, t.q, s.k, 1, t.wt, MAX_ROWS, rows, columns, K, np.float32(1), False, FULL)
    gemm(x, t.A, MAX_ROWS, t.k, s.k, 1, t.wt, MAX_ROWS, rows, columns, K, np.float32(1), False, FULL)
    mask_future(x, t.P, rows, s.r, s.r)
    mask_future(x, t.A, rows, s.r, 0)
    gemm(x, t.E, s.v, t.k, s.k, 1, t.S, s.v, rows, s.v, K, np.float32(-1), True, FULL)
    substitute(x, t.E, t.A, MAX_ROWS, rows, s.v)


@njit(**OPTIONS)
def outputs(x, t, s, o, chunk):
    """The read-outs of the chunk's queries, into o."""
    n = chunk.tokens * s.r
    rows = -(-n // ROWS) * ROWS
    gemm(x, t.D, s.v, t.q, s.k, 1, t.S, s.v, rows, s.v, 2 * s.m, np.float32(1), False, FULL)
    gemm(x, t.D, s.v, t.P, MAX_ROWS, 1, t.E, s.v, rows, s.v, n, np.float32(1), True, LOWER)
    store_rows(x, t.D, s, o, chunk)


@njit(**OPTIONS)
def advance(x, t, s, chunk):
    """The state after the chunk."""
    gemm(x, t.S, s.v, t.w, 1, s.k, t.E, s.v, s.k, s.v, chunk.tokens * s.r, np.float32(1), True, FULL)
    rescale(x, t.S, t.leave, s)
