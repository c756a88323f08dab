"""Whole sequences, chunk by chunk. A unit of work is one head of one batch row: unit = b H + h.

Legend: as in workspace.py.

Chunks end where decay requires it, unit by unit, so that strong decay in one head does not slow the others. Only the
state is kept, in the gauge without phase, and only before sections: chunks of MAX_ROWS rows together at most, commonly
one. The backward pass recomputes the rest with the forward's code.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from qies.ops.compiled import OPTIONS, kernel
from qies.ops.entangle.cpu.chunk_backward import (
    chunk_gradients,
    gate_gradients,
    input_gradients,
    state_terms,
    write_gradients,
)
from qies.ops.entangle.cpu.chunk_forward import advance, outputs, prepare
from qies.ops.entangle.cpu.workspace import MAX_ROWS, Chunk, rescale, token
from qies.ops.entangle.layout import MAX_CHUNK_DECAY
from qies.ops.simd import cos_sin, get, prefetch, put, read

GROUP = 8  # neighbouring heads processed together: their states stay in the L2 cache


@njit(**OPTIONS)
def chunk_end(log_alpha, s, b, h, start):
    """The end of the chunk of head h that starts at token `start`: full, or before its decay exceeds the limit.

    The first token's decay acts on the state alone, so it may be of any size.
    """
    stop, total = start + 1, np.float32(0)
    while stop < s.T and stop - start < MAX_ROWS // s.r:
        at = ((b * s.T + stop) * s.H + h) * s.decays
        strongest = np.float32(0)
        for i in range(s.decays):
            strongest = min(strongest, read(log_alpha, at + i))
        total -= strongest
        if total > MAX_CHUNK_DECAY:
            break
        stop += 1
    return stop


@kernel
def plan(log_alpha, s, B):
    """The chunks of all units: `starts`, and `first` `[B H + 1]`, where a unit's begin there; each unit's end with T.

    `place`, shaped like `starts`: which of the kept states is that before a chunk, or, for one inside a section, minus
    the chunks since the section's start. And how many are kept.
    """
    first = np.zeros(B * s.H + 1, np.int64)
    for unit in range(B * s.H):
        t, count = 0, 1
        while t < s.T:
            t = chunk_end(log_alpha, s, unit // s.H, unit % s.H, t)
            count += 1
        first[unit + 1] = first[unit] + count
    starts, place, count = np.empty(first[-1], np.int64), np.empty(first[-1], np.int64), 0
    for unit in range(B * s.H):
        t = home = 0
        for slot in range(first[unit], first[unit + 1]):
            stop = chunk_end(log_alpha, s, unit // s.H, unit % s.H, t) if t < s.T else t
            starts[slot] = t
            if t == 0 or t == s.T or (stop - starts[home]) * s.r > MAX_ROWS:
                place[slot], home, count = count, slot, count + 1
            else:
                place[slot] = home - slot
            t = stop
    return first, starts, place, count


@njit(**OPTIONS)
def load_state(x, to, state, at, s):
    """Load the state `[2m, V]` at `state[at:]` into the buffer `to` `[k, v]`, padded with zeros."""
    if s.k * s.v > 2 * s.m * s.V:
        for i in range(s.k * s.v):
            put(x, to + i, np.float32(0))
    for c in range(2 * s.m):
        for j in range(s.V):
            put(x, to + c * s.v + j, get(state, at + c * s.V + j))


@njit(**OPTIONS)
def store_state(x, source, state, at, s):
    """Store a state: the inverse of `load_state`."""
    for c in range(2 * s.m):
        for j in range(s.V):
            put(state, at + c * s.V + j, get(x, source + c * s.v + j))


@njit(**OPTIONS)
def rotate_state(state, at, turns, sign, s):
    """Multiply the state `[2m, V]` at `state[at:]` by e^{2 pi i sign turns}."""
    for c in range(s.m):
        cos, sin = cos_sin(turns[c])
        sin *= sign
        row, other = at + c * s.V, at + (c + s.m) * s.V
        for j in range(s.V):
            re, im = get(state, row + j), get(state, other + j)
            put(state, row + j, re * cos - im * sin)
            put(state, other + j, re * sin + im * cos)


@njit(**OPTIONS)
def chunk_at(s, unit, starts, slot):
    """The chunk that starts at `starts[slot]`, of a unit."""
    return Chunk(unit // s.H, unit % s.H, starts[slot], starts[slot + 1] - starts[slot])


@njit(**OPTIONS)
def group_end(unit, end, s, first):
    """The end of the group of units that starts with `unit`, and its largest number of chunks: neighbouring heads of a
    batch row, whose tokens are adjacent in memory."""
    stop, most = unit, 0
    while stop < end and stop // s.H == unit // s.H and stop - unit < GROUP:
        most = max(most, first[stop + 1] - first[stop] - 1)
        stop += 1
    return stop, most


@njit(**OPTIONS)
def prefetch_chunk(s, chunk, keys, values, theta):
    """Prefetch the inputs of a chunk."""
    first, tokens, K, V = token(s, chunk, 0), chunk.tokens, 2 * s.m, s.r * s.V
    for x in keys:
        prefetch(x, first * K, s.H * K, K, tokens)
    for x in values:
        prefetch(x, first * V, s.H * V, V, tokens)
    if s.phases:
        prefetch(theta, first * s.m, s.H * s.m, s.m, tokens)


@kernel
def forward(inputs, state, o, s, t, floats, begin, end, chunks, kept, phases):
    """Units from `begin` to `end`: the outputs into o, the last state into `state` in place of the first.

    Unless `kept` is empty, it receives the states `[.., 2m, V]` that `chunks.place` names, and `phases` `[.., m]` the
    phases before every chunk and after the last, in turns.
    """
    first, starts, place = chunks
    x, turns = np.zeros(floats, np.float32), np.zeros((GROUP, s.m), np.float64)
    area, keep = 2 * s.m * s.V, len(kept) > 0
    unit = begin
    while unit < end:
        stop, most = group_end(unit, end, s, first)
        turns[:] = 0
        for i in range(most + 1):
            for u in range(unit, stop):
                slot, count = first[u] + i, first[u + 1] - first[u] - 1
                if i > count:
                    continue
                load_state(x, t.S, state, u * area, s)
                if keep:
                    if place[slot] >= 0:
                        store_state(x, t.S, kept, place[slot] * area, s)
                    phases[slot * s.m : (slot + 1) * s.m] = turns[u - unit]
                if i < count:
                    chunk = chunk_at(s, u, starts, slot)
                    if i + 1 < count:
                        ahead = chunk_at(s, u, starts, slot + 1)
                        prefetch_chunk(s, ahead, (inputs.q, inputs.k), (inputs.v,), inputs.theta)
                    prepare(x, t, s, inputs, turns[u - unit], chunk)
                    outputs(x, t, s, o, chunk)
                    advance(x, t, s, chunk)
                    store_state(x, t.S, state, u * area, s)
                elif s.phases:
                    rotate_state(state, u * area, turns[u - unit], np.float32(1), s)
        unit = stop


@njit(**OPTIONS)
def recompute_states(x, t, s, inputs, unit, slot, chunks, kept, phases, turns, states, at):
    """Recompute the states before the chunks of the section that ends with the chunk `slot`, from the kept one, into
    `states[at:]`, whose first place is left for the kept one."""
    starts, place = chunks.starts, chunks.place
    home, area = slot + place[slot], 2 * s.m * s.V
    turns[:] = phases[home * s.m : (home + 1) * s.m]
    load_state(x, t.S, kept, place[home] * area, s)
    for i in range(home, slot):
        chunk = chunk_at(s, unit, starts, i)
        prepare(x, t, s, inputs, turns, chunk)
        advance(x, t, s, chunk)
        store_state(x, t.S, states, at + (i + 1 - home) * area, s)


@kernel
def backward(inputs, grads, do, dstate, s, t, floats, begin, end, chunks, kept, phases):
    """Units from `begin` to `end`: every gradient; `dstate`, of the last state, becomes that of the first."""
    first, starts, place = chunks
    x, turns = np.zeros(floats, np.float32), np.zeros(s.m, np.float64)
    area, depth = 2 * s.m * s.V, 1 - place.min()
    inside = np.empty(GROUP * depth * area if depth > 1 else 0, np.float32)
    unit = begin
    while unit < end:
        stop, most = group_end(unit, end, s, first)
        for i in range(most):
            for u in range(unit, stop):
                last = first[u + 1] - 1
                slot = last - 1 - i
                if slot < first[u]:
                    continue
                if i == 0 and s.phases:
                    rotate_state(dstate, u * area, phases[last * s.m : (last + 1) * s.m], np.float32(-1), s)
                chunk = chunk_at(s, u, starts, slot)
                if slot > first[u]:
                    behind, keys = chunk_at(s, u, starts, slot - 1), (inputs.q, inputs.k, grads.q, grads.k)
                    prefetch_chunk(s, behind, keys, (inputs.v, do, grads.v), inputs.theta)
                load_state(x, t.G, dstate, u * area, s)
                section = (u - unit) * depth * area
                if place[slot + 1] >= 0:
                    state_terms(x, t, s, chunk.tokens, kept, place[slot + 1] * area, s.V)
                    if place[slot] < 0:
                        recompute_states(x, t, s, inputs, u, slot, chunks, kept, phases, turns, inside, section)
                else:
                    state_terms(x, t, s, chunk.tokens, inside, section - place[slot + 1] * area, s.V)
                if place[slot] >= 0:
                    load_state(x, t.S, kept, place[slot] * area, s)
                else:
                    load_state(x, t.S, inside, section - place[slot] * area, s)
                turns[:] = phases[slot * s.m : (slot + 1) * s.m]
                prepare(x, t, s, inputs, turns, chunk)
                rescale(x, t.G, t.leave, s)
                chunk_gradients(x, t, s, do, grads.v, chunk)
                write_gradients(x, t, s, inputs.beta, grads.beta, chunk)
                input_gradients(x, t, s, t.q, t.dq, grads.q, 0, chunk)
                input_gradients(x, t, s, t.k, t.dk, grads.k, 1, chunk)
                gate_gradients(x, t, s, grads.log_alpha, grads.theta, chunk)
                rescale(x, t.G, t.enter, s)
                store_state(x, t.G, dstate, u * area, s)
        unit = stop
