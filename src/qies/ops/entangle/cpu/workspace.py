"""The buffers of one chunk of one head, and the operations on them that forward and backward share.

Legend, for all files of this folder:

- x: the workspace, one float32 array. t: the offsets of the buffers in it (`Buffers`).
- s: the sizes of the call (`Sizes`). K = 2m and V are those of the op; k and v are K and V padded to whole vectors.
  Sums never run over padding.
- chunk: batch row b, head h, first token and number of tokens (`Chunk`).
- r: key rows per token, 1 in real mode and 2 in complex mode. n: rows in use, of the MAX_ROWS of a chunk.
- unit: one head of one batch row, b H + h. slot: the index of a chunk in `Chunks.starts`.
- section: consecutive chunks with at most MAX_ROWS rows together. Only the state before a section is kept.
- Theta: the running sum of theta. `phase` holds it in turns (multiples of 2 pi), reduced to [0, 1), in float64.
- J: multiplication by i of a pair [Re | Im], J(a|b) = (-b|a).
- c: a channel. i: a token or a row. at: an offset into an input or output. re, im: real and imaginary part.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from qies.ops.compiled import OPTIONS
from qies.ops.simd import LANES, get, put, read, write

MAX_ROWS = 32  # rows of a chunk: tokens, or half as many in complex mode


class Arrays(NamedTuple):
    """The op's inputs, or their gradients, as flat arrays. An input that is None is an empty array."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    beta: np.ndarray
    log_alpha: np.ndarray
    theta: np.ndarray


class Chunks(NamedTuple):
    """The chunks of all units, see `scan.plan`."""

    first: np.ndarray
    starts: np.ndarray
    kept_at: np.ndarray


class Chunk(NamedTuple):
    """Batch row, head, first token and number of tokens of a chunk."""

    b: int
    h: int
    start: int
    tokens: int


class Sizes(NamedTuple):
    """Sizes of a call: tokens T, heads H, complex key channels m, value channels V, key rows per token r, decays and
    betas per token and head, whether there are phases, and K and V padded to whole vectors."""

    T: int
    H: int
    m: int
    V: int
    r: int
    decays: int
    betas: int
    has_phase: bool
    k: int
    v: int


class Buffers(NamedTuple):
    """Offsets of a chunk's buffers in the workspace, with R = MAX_ROWS.

    `[R, k]`: q and k, the unit queries and keys; w = beta k; all three at the scales of
    `chunk_forward.decays_and_phases`; their gradients dq, dk, dw; wt and dwt, transposed; read_scale; read_to_write =
    1 / read_scale^2.
    `[R, v]`: E, the values written; D, scratch; do, the gradients of the read-outs; Et, transposed.
    `[R, R]`: P, the products of queries and writes; A, of keys and writes; their gradients dP and dA.
    `[k, v]`: S, the state; G, its gradient; St, transposed.
    `[R, m]`: cos and sin of Theta. `[2, R]`: norm, the reciprocal lengths of queries and keys.
    `[k]`: scale_in and scale_out, the scales of the state before and after the chunk.
    `[R + 1, m]`: decay_terms and phase_terms, the terms of each token, and last of the state after the chunk, in the
    gradients of decay and phase.
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
    do: int
    Et: int
    A: int
    P: int
    dA: int
    dP: int
    S: int
    St: int
    G: int
    cos: int
    sin: int
    norm: int
    read_scale: int
    read_to_write: int
    scale_in: int
    scale_out: int
    decay_terms: int
    phase_terms: int


def buffer_layout(k: int, v: int, m: int) -> tuple[Buffers, int]:
    """The buffers for padded widths k and v, and the size of the workspace in float32 numbers."""
    R = MAX_ROWS
    sizes = (
        [R * k] * 8
        + [R * v] * 4
        + [R * R] * 4
        + [k * v] * 3
        + [R * m, R * m, 2 * R, R * k, R * k, k, k, (R + 1) * m, (R + 1) * m]
    )
    starts = np.cumsum([0] + [-(-size // LANES) * LANES for size in sizes])
    return Buffers(*map(int, starts[:-1])), int(starts[-1])


@njit(**OPTIONS)
def token(s, chunk, i):
    """The index of a chunk's token i and head in a contiguous `[B, T, H]`."""
    return (chunk.b * s.T + chunk.start + i) * s.H + chunk.h


@njit(**OPTIONS)
def rotate(x, row, cos, sin, sign, m):
    """Multiply the pair at `row` by cos + i sign sin, channel by channel."""
    for c in range(m):
        re, im, turned = get(x, row + c), get(x, row + m + c), sign * get(x, sin + c)
        put(x, row + c, re * get(x, cos + c) - im * turned)
        put(x, row + m + c, im * get(x, cos + c) + re * turned)


@njit(**OPTIONS)
def put_times_i(x, row, k, m):
    """Store the row Jx after the row x."""
    for c in range(m):
        put(x, row + k + c, -get(x, row + m + c))
        put(x, row + k + m + c, get(x, row + c))


@njit(**OPTIONS)
def merge_rows(x, row, k, m):
    """Add the gradient of the row Jx to that of the row x."""
    for c in range(m):
        put(x, row + c, get(x, row + c) + get(x, row + k + m + c))
        put(x, row + m + c, get(x, row + m + c) - get(x, row + k + c))


@njit(**OPTIONS)
def rescale(x, state, scale, s):
    """Multiply every row of a state `[k, v]` by its entry of `scale`."""
    for c in range(2 * s.m):
        value, row = get(x, scale + c), state + c * s.v
        for j in range(s.v):
            put(x, row + j, get(x, row + j) * value)


@njit(**OPTIONS)
def mask_future(x, square, rows, r, own):
    """Causal mask: zero each row's columns from its token's first row + `own` on."""
    for i in range(rows):
        row = square + i * MAX_ROWS
        for j in range(i - i % r + own, MAX_ROWS):
            put(x, row + j, np.float32(0))


@njit(**OPTIONS)
def load_rows(x, to, s, values, chunk):
    """Load the rows `[.., V]` of a chunk's values."""
    for i in range(chunk.tokens * s.r):
        at = (token(s, chunk, i // s.r) * s.r + i % s.r) * s.V
        for c in range(s.V):
            put(x, to + i * s.v + c, read(values, at + c))


@njit(**OPTIONS)
def store_rows(x, source, s, values, chunk):
    """Store the rows of a chunk: the inverse of `load_rows`."""
    for i in range(chunk.tokens * s.r):
        at = (token(s, chunk, i // s.r) * s.r + i % s.r) * s.V
        for c in range(s.V):
            write(values, at + c, get(x, source + i * s.v + c))
