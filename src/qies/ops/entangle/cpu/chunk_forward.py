"""The arithmetic of one chunk of one head, forward. ../README.md derives the formulas.

Legend: see workspace.py.
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
def decays_and_phases(x, t, s, log_alpha, theta, phase, chunk):
    """Compute the scales and the rotations of a chunk, and advance the running phase.

    Let g be the running sum of log_alpha without the first token's, and c half of its last value. Then read_scale =
    e^{g - c}, read_to_write = e^{2(c - g)}, scale_in = e^{c} times the first token's decay, and scale_out = e^{c}.
    """
    K, per = 2 * s.m, s.decays
    step = s.H * per
    at = token(s, chunk, 0) * per
    for i in range(chunk.tokens):
        row = t.read_scale + i * s.k
        for c in range(per):
            before = get(x, row - s.k + c) + read(log_alpha, at + i * step + c) if i else np.float32(0)
            put(x, row + c, before)
    last = t.read_scale + (chunk.tokens - 1) * s.k
    for c in range(per):
        put(x, t.scale_out + c, get(x, last + c) * np.float32(0.5))
    for i in range(chunk.tokens):
        row = t.read_scale + i * s.k
        for c in range(per):
            value = exp(get(x, row + c) - get(x, t.scale_out + c))
            put(x, row + c, value)
            put(x, t.read_to_write + i * s.k + c, np.float32(1) / (value * value))
        broadcast_channels(x, row, per, s.m, K)
        broadcast_channels(x, t.read_to_write + i * s.k, per, s.m, K)
    for c in range(per):
        put(x, t.scale_in + c, exp(get(x, t.scale_out + c) + read(log_alpha, at + c)))
        put(x, t.scale_out + c, exp(get(x, t.scale_out + c)))
    broadcast_channels(x, t.scale_in, per, s.m, K)
    broadcast_channels(x, t.scale_out, per, s.m, K)
    if s.has_phase:
        for i in range(chunk.tokens):
            at = token(s, chunk, i) * s.m
            for c in range(s.m):
                turns = phase[c] + np.float64(read(theta, at + c)) * (0.5 / np.pi)
                turns -= np.floor(turns)
                phase[c] = turns
                cos, sin = cos_sin(turns)
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
    """Load the rows of queries (which = 0) or keys (which = 1), normalised, rotated by -Theta and rescaled."""
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
        read_scale = t.read_scale + i * s.k
        for c in range(K):
            put(x, row + c, np.float32(np.float64(read(source, at + c)) * (norm * np.float64(get(x, read_scale + c)))))
        if s.has_phase:
            rotate(x, row, t.cos + i * s.m, t.sin + i * s.m, np.float32(-1), s.m)
        if s.r == 2:
            put_times_i(x, row, s.k, s.m)


@njit(**OPTIONS)
def write_rows(x, t, s, beta, chunk):
    """Compute the rows of writes, w = beta k, from the rows k, and convert the scale of reads to that of writes."""
    m = s.m
    for i in range(chunk.tokens):
        row, read_to_write, at = i * s.r * s.k, t.read_to_write + i * s.k, token(s, chunk, i) * s.betas
        w, k, re = t.w + row, t.k + row, read(beta, at)
        if s.betas == 1:
            for c in range(2 * m):
                put(x, w + c, get(x, k + c) * (re * get(x, read_to_write + c)))
        else:
            im = read(beta, at + 1)
            for c in range(m):
                own, other, scale = get(x, k + c), get(x, k + m + c), get(x, read_to_write + c)
                put(x, w + c, (re * own - im * other) * scale)
                put(x, w + m + c, (re * other + im * own) * scale)
        if s.r == 2:
            put_times_i(x, w, s.k, m)


@njit(**OPTIONS)
def prepare(x, t, s, inputs, phase, chunk):
    """Compute q, k, w, A, P and the values written E of a chunk from the state S before it. Rescales S."""
    K, n = 2 * s.m, chunk.tokens * s.r
    rows = -(-n // ROWS) * ROWS
    decays_and_phases(x, t, s, inputs.log_alpha, inputs.theta, phase, chunk)
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
    rescale(x, t.S, t.scale_in, s)
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
    """Write the read-outs of the chunk's queries to o."""
    n = chunk.tokens * s.r
    rows = -(-n // ROWS) * ROWS
    gemm(x, t.D, s.v, t.q, s.k, 1, t.S, s.v, rows, s.v, 2 * s.m, np.float32(1), False, FULL)
    gemm(x, t.D, s.v, t.P, MAX_ROWS, 1, t.E, s.v, rows, s.v, n, np.float32(1), True, LOWER)
    store_rows(x, t.D, s, o, chunk)


@njit(**OPTIONS)
def advance(x, t, s, chunk):
    """Advance S to the state after the chunk."""
    gemm(x, t.S, s.v, t.w, 1, s.k, t.E, s.v, s.k, s.v, chunk.tokens * s.r, np.float32(1), True, FULL)
    rescale(x, t.S, t.scale_out, s)
