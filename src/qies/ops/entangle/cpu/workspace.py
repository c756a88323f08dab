"""The buffers of one chunk of one head, and what both directions do with them.

Legend: K = 2m and V of the op; r key rows a token (1 real, 2 complex); n rows in use of the RANGE a chunk has. Buffers
are padded to whole vectors of k and v numbers; sums never run over padding.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from qies.ops.compiled import OPTIONS
from qies.ops.simd import LANES, get, put, read, write

RANGE = 32  # rows of a chunk: tokens, or half as many in complex mode


class Sizes(NamedTuple):
    """Of a call: tokens, heads, complex key channels, value channels, rows a token, decays and betas a token and head,
    whether there are phases, and K and V padded."""

    T: int
    H: int
    m: int
    V: int
    r: int
    decays: int
    betas: int
    phases: bool
    k: int
    v: int


class Tile(NamedTuple):
    """Where a chunk's buffers start in the workspace.

    `[RANGE, k]`: q, k unit queries and keys, w = beta k, rescaled as `controls` says, and their gradients; wt, dwt
    transposed; reads e^{g - c}, undo 1 / reads^2. `[RANGE, v]`: E the values written, D scratch, outs the outputs'
    gradients; Et transposed. `[RANGE, RANGE]`: P what queries, A what keys see of writes, and their gradients MP, MA.
    `[k, v]`: S the state and G its gradient; St transposed. `[RANGE, m]`: cos, sin. `[2, RANGE]`: norm. `[k]`: enter,
    leave rescale the state. `[RANGE + 1, m]`: damps, spins, what each token, and last the state behind them, adds to
    the gradients of decay and phase.
    """

    q: int
    k: int
    w: int
    wt: int
    dq: int
    dk: int
    dw: int
    dwt: int
    E: int
    D: int
    outs: int
    Et: int
    A: int
    P: int
    MA: int
    MP: int
    S: int
    St: int
    G: int
    cos: int
    sin: int
    norm: int
    reads: int
    undo: int
    enter: int
    leave: int
    damps: int
    spins: int


def tile_of(k: int, v: int, m: int) -> tuple[Tile, int]:
    """The buffers for padded widths k and v, and how many float32 they take."""
    R = RANGE
    sizes = (
        [R * k] * 8
        + [R * v] * 4
        + [R * R] * 4
        + [k * v] * 3
        + [R * m, R * m, 2 * R, R * k, R * k, k, k, (R + 1) * m, (R + 1) * m]
    )
    starts = np.cumsum([0] + [-(-size // LANES) * LANES for size in sizes])
    return Tile(*map(int, starts[:-1])), int(starts[-1])


@njit(**OPTIONS)
def turn(x, row, cos, sin, sign, m):
    """A pair times cos + i sign sin, channel by channel."""
    for c in range(m):
        re, im, turned = get(x, row + c), get(x, row + m + c), sign * get(x, sin + c)
        put(x, row + c, re * get(x, cos + c) - im * turned)
        put(x, row + m + c, im * get(x, cos + c) + re * turned)


@njit(**OPTIONS)
def spread(x, row, k, m):
    """The row Jx behind the row x."""
    for c in range(m):
        put(x, row + k + c, -get(x, row + m + c))
        put(x, row + k + m + c, get(x, row + c))


@njit(**OPTIONS)
def fold(x, row, k, m):
    """The gradient of a pair, into its row, from those of the rows x and Jx."""
    for c in range(m):
        put(x, row + c, get(x, row + c) + get(x, row + k + m + c))
        put(x, row + m + c, get(x, row + m + c) - get(x, row + k + c))


@njit(**OPTIONS)
def rescale(x, state, scale, s):
    """Every row of a state `[k, v]` times its entry of `scale`."""
    for c in range(2 * s.m):
        value, row = get(x, scale + c), state + c * s.v
        for j in range(s.v):
            put(x, row + j, get(x, row + j) * value)


@njit(**OPTIONS)
def hide(x, square, rows, r, own):
    """Zero what lies in a row's future: columns from its token's first row + own on."""
    for i in range(rows):
        row = square + i * RANGE
        for j in range(i - i % r + own, RANGE):
            put(x, row + j, np.float32(0))


@njit(**OPTIONS)
def take_in(x, to, s, values, b, h, start, n):
    """n rows `[.., V]` of a chunk's values."""
    for i in range(n):
        at = (((b * s.T + start + i // s.r) * s.H + h) * s.r + i % s.r) * s.V
        for c in range(s.V):
            put(x, to + i * s.v + c, read(values, at + c))


@njit(**OPTIONS)
def hand_out(x, source, s, values, b, h, start, n):
    """The inverse of `take_in`."""
    for i in range(n):
        at = (((b * s.T + start + i // s.r) * s.H + h) * s.r + i % s.r) * s.V
        for c in range(s.V):
            write(values, at + c, get(x, source + i * s.v + c))
