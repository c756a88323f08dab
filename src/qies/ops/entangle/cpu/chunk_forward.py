"""The arithmetic of one chunk of one head, forward. README.md in the folder above derives the formulas.

Legend: K = 2m and V of the op; r key rows a token (1 real, 2 complex); n rows in use of the RANGE a chunk has. Buffers
are padded to whole vectors of k and v numbers; sums never run over padding.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from qies.ops.compiled import OPTIONS
from qies.ops.entangle.cpu.workspace import RANGE, hand_out, hide, rescale, spread, take_in, turn
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

STEEPEST = 1e25  # of the gradient through the direction of a vector that is next to nothing: float32 ends at 3e38


@njit(**OPTIONS)
def controls(x, t, s, log_alpha, theta, turns, b, h, start, tokens):
    """Decays and phases of a chunk; `turns` advances.

    With g the running sum of log_alpha without the first token's and c half its last value: reads = e^{g - c}, undo =
    e^{2(c - g)}; enter = e^{c} times the first token's decay, leave = e^{c}.
    """
    K, per = 2 * s.m, s.decays
    step = s.H * per
    at = (b * s.T + start) * step + h * per
    for i in range(tokens):
        row = t.reads + i * s.k
        for c in range(per):
            before = get(x, row - s.k + c) + read(log_alpha, at + i * step + c) if i else np.float32(0)
            put(x, row + c, before)
    last = t.reads + (tokens - 1) * s.k
    for c in range(per):
        put(x, t.leave + c, get(x, last + c) * np.float32(0.5))
    for i in range(tokens):
        row = t.reads + i * s.k
        for c in range(per):
            value = exp(get(x, row + c) - get(x, t.leave + c))
            put(x, row + c, value)
            put(x, t.undo + i * s.k + c, np.float32(1) / (value * value))
        widen(x, row, per, s.m, K)
        widen(x, t.undo + i * s.k, per, s.m, K)
    for c in range(per):
        put(x, t.enter + c, exp(get(x, t.leave + c) + read(log_alpha, at + c)))
        put(x, t.leave + c, exp(get(x, t.leave + c)))
    widen(x, t.enter, per, s.m, K)
    widen(x, t.leave, per, s.m, K)
    if s.phases:
        for i in range(tokens):
            at = ((b * s.T + start + i) * s.H + h) * s.m
            for c in range(s.m):
                turn = turns[c] + np.float64(read(theta, at + c)) * (0.5 / np.pi)
                turn -= np.floor(turn)
                turns[c] = turn
                cos, sin = cos_sin(turn)
                put(x, t.cos + i * s.m + c, cos)
                put(x, t.sin + i * s.m + c, sin)


@njit(**OPTIONS)
def widen(x, row, per, m, K):
    """One value, or one a complex channel, spread over the 2m real channels of a row."""
    if per == 1:
        value = get(x, row)
        for c in range(K):
            put(x, row + c, value)
    else:
        for c in range(m):
            put(x, row + m + c, get(x, row + c))


@njit(**OPTIONS)
def load(x, t, s, rows, source, which, b, h, start, tokens):
    """A chunk's queries (which = 0) or keys (1) as rows: of unit length, turned back by the phase and rescaled."""
    K = 2 * s.m
    for i in range(tokens):
        row, at = rows + i * s.r * s.k, ((b * s.T + start + i) * s.H + h) * K
        square = np.float64(0)
        for c in range(K):
            value = np.float64(read(source, at + c))
            square += value * value
        # in float64, or the same small error in every key's length would add up over a long row of reflections
        norm = 1 / np.sqrt(square) if square > 0 else np.float64(0)
        put(x, t.norm + which * RANGE + i, np.float32(min(norm, STEEPEST)))
        reads = t.reads + i * s.k
        for c in range(K):
            put(x, row + c, np.float32(np.float64(read(source, at + c)) * (norm * np.float64(get(x, reads + c)))))
        if s.phases:
            turn(x, row, t.cos + i * s.m, t.sin + i * s.m, np.float32(-1), s.m)
        if s.r == 2:
            spread(x, row, s.k, s.m)


@njit(**OPTIONS)
def along(x, t, s, beta, b, h, start, tokens):
    """The rows of writes, w = beta k, from the rows k of reads, which `undo` brings to the scale of writes."""
    m = s.m
    for i in range(tokens):
        row, undo, at = i * s.r * s.k, t.undo + i * s.k, ((b * s.T + start + i) * s.H + h) * s.betas
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
            spread(x, w, s.k, m)


@njit(**OPTIONS)
def prepare(x, t, s, q, k, v, beta, log_alpha, theta, turns, b, h, start, tokens):
    """Of a chunk with the state S before it: q, k, w, A, P and the values written, E. S is brought to its scale."""
    K, n = 2 * s.m, tokens * s.r
    rows = -(-n // ROWS) * ROWS
    controls(x, t, s, log_alpha, theta, turns, b, h, start, tokens)
    load(x, t, s, t.q, q, 0, b, h, start, tokens)
    load(x, t, s, t.k, k, 1, b, h, start, tokens)
    along(x, t, s, beta, b, h, start, tokens)
    take_in(x, t.E, s, v, b, h, start, n)
    for i in range(n * s.k, rows * s.k):
        put(x, t.q + i, np.float32(0))
        put(x, t.k + i, np.float32(0))
        put(x, t.w + i, np.float32(0))
    for i in range(n * s.v, rows * s.v):
        put(x, t.E + i, np.float32(0))
    rescale(x, t.S, t.enter, s)
    transpose(x, t.wt, RANGE, t.w, s.k, RANGE, s.k)
    columns = LANES if n <= LANES else RANGE
    gemm(x, t.P, RANGE, t.q, s.k, 1, t.wt, RANGE, rows, columns, K, np.float32(1), False, FULL)
    gemm(x, t.A, RANGE, t.k, s.k, 1, t.wt, RANGE, rows, columns, K, np.float32(1), False, FULL)
    hide(x, t.P, rows, s.r, s.r)
    hide(x, t.A, rows, s.r, 0)
    gemm(x, t.E, s.v, t.k, s.k, 1, t.S, s.v, rows, s.v, K, np.float32(-1), True, FULL)
    substitute(x, t.E, t.A, RANGE, rows, s.v)


@njit(**OPTIONS)
def outputs(x, t, s, o, b, h, start, tokens):
    """What the queries read, to o."""
    n = tokens * s.r
    rows = -(-n // ROWS) * ROWS
    gemm(x, t.D, s.v, t.q, s.k, 1, t.S, s.v, rows, s.v, 2 * s.m, np.float32(1), False, FULL)
    gemm(x, t.D, s.v, t.P, RANGE, 1, t.E, s.v, rows, s.v, n, np.float32(1), True, LOWER)
    hand_out(x, t.D, s, o, b, h, start, n)


@njit(**OPTIONS)
def advance(x, t, s, tokens):
    """The state after the chunk."""
    gemm(x, t.S, s.v, t.w, 1, s.k, t.E, s.v, s.k, s.v, tokens * s.r, np.float32(1), True, FULL)
    rescale(x, t.S, t.leave, s)
