"""Whole sequences, chunk by chunk. A unit of work is one head of one batch row: unit = b H + h.

Chunks are cut where damping asks for it, unit by unit, so that strong damping in one head costs no other. Only the
state is kept, in the gauge without phase, and only before sections: chunks of RANGE rows together at most, commonly
one. The backward makes the rest again by the forward's code.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from qies.ops.compiled import OPTIONS, kernel
from qies.ops.entangle.cpu.chunk_backward import pull, settle, sum_up, through, turn_back
from qies.ops.entangle.cpu.chunk_forward import advance, outputs, prepare
from qies.ops.entangle.cpu.workspace import RANGE, rescale
from qies.ops.entangle.layout import MAX_CHUNK_DECAY
from qies.ops.simd import cos_sin, get, prefetch, put, read

ABREAST = 8  # most heads that go in step: their states stay in the nearer cache


@njit(**OPTIONS)
def cut(log_alpha, s, b, h, start):
    """Where the chunk of head h that starts at token `start` ends: when it is full, or before it damps too much.

    The first token's damping acts on the state alone, so it may be of any size.
    """
    stop, total = start + 1, np.float32(0)
    while stop < s.T and stop - start < RANGE // s.r:
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
            t = cut(log_alpha, s, unit // s.H, unit % s.H, t)
            count += 1
        first[unit + 1] = first[unit] + count
    starts, place, count = np.empty(first[-1], np.int64), np.empty(first[-1], np.int64), 0
    for unit in range(B * s.H):
        t = home = 0
        for slot in range(first[unit], first[unit + 1]):
            stop = cut(log_alpha, s, unit // s.H, unit % s.H, t) if t < s.T else t
            starts[slot] = t
            if t == 0 or t == s.T or (stop - starts[home]) * s.r > RANGE:
                place[slot], home, count = count, slot, count + 1
            else:
                place[slot] = home - slot
            t = stop
    return first, starts, place, count


@njit(**OPTIONS)
def copy_state(x, to, state, at, s):
    """The state `[2m, V]` at `state[at:]` into `[k, v]`, padded with zeros."""
    if s.k * s.v > 2 * s.m * s.V:
        for i in range(s.k * s.v):
            put(x, to + i, np.float32(0))
    for c in range(2 * s.m):
        for j in range(s.V):
            put(x, to + c * s.v + j, get(state, at + c * s.V + j))


@njit(**OPTIONS)
def keep_state(x, source, state, at, s):
    """The inverse of `copy_state`."""
    for c in range(2 * s.m):
        for j in range(s.V):
            put(state, at + c * s.V + j, get(x, source + c * s.v + j))


@njit(**OPTIONS)
def turn_state(state, at, turns, sign, s):
    """A state `[2m, V]` at `state[at:]` times e^{2 pi i turns}, or its inverse for sign -1."""
    for c in range(s.m):
        cos, sin = cos_sin(turns[c])
        sin *= sign
        row, other = at + c * s.V, at + (c + s.m) * s.V
        for j in range(s.V):
            re, im = get(state, row + j), get(state, other + j)
            put(state, row + j, re * cos - im * sin)
            put(state, other + j, re * sin + im * cos)


@njit(**OPTIONS)
def together(unit, end, s, first):
    """Where the units that go in step with `unit` end, and the most chunks of any: neighbouring heads of a batch row,
    whose tokens lie side by side in memory."""
    stop, most = unit, 0
    while stop < end and stop // s.H == unit // s.H and stop - unit < ABREAST:
        most = max(most, first[stop + 1] - first[stop] - 1)
        stop += 1
    return stop, most


@njit(**OPTIONS)
def look_ahead(s, b, h, start, stop, keys, values, theta):
    """Ask for what a chunk of tokens reads."""
    first, tokens, K, V = (b * s.T + start) * s.H + h, stop - start, 2 * s.m, s.r * s.V
    for x in keys:
        prefetch(x, first * K, s.H * K, K, tokens)
    for x in values:
        prefetch(x, first * V, s.H * V, V, tokens)
    if s.phases:
        prefetch(theta, first * s.m, s.H * s.m, s.m, tokens)


@kernel
def forward(q, k, v, beta, log_alpha, theta, state, o, s, t, floats, begin, end, first, starts, place, kept, phases):
    """Units from `begin` to `end`: the outputs into o, the last state into `state` in place of the first.

    Unless `kept` is empty, states go there as `place` says, `[.., 2m, V]`, and the phases before every chunk and after
    the last into `phases` `[.., m]`, in turns.
    """
    x, turns = np.zeros(floats, np.float32), np.zeros((ABREAST, s.m), np.float64)
    area, keep = 2 * s.m * s.V, len(kept) > 0
    unit = begin
    while unit < end:
        stop, most = together(unit, end, s, first)
        turns[:] = 0
        for i in range(most + 1):
            for u in range(unit, stop):
                slot, chunks = first[u] + i, first[u + 1] - first[u] - 1
                if i > chunks:
                    continue
                copy_state(x, t.S, state, u * area, s)
                if keep:
                    if place[slot] >= 0:
                        keep_state(x, t.S, kept, place[slot] * area, s)
                    phases[slot * s.m : (slot + 1) * s.m] = turns[u - unit]
                if i < chunks:
                    b, h, start, tokens = u // s.H, u % s.H, starts[slot], starts[slot + 1] - starts[slot]
                    if i + 1 < chunks:
                        look_ahead(s, b, h, starts[slot + 1], starts[slot + 2], (q, k), (v,), theta)
                    prepare(x, t, s, q, k, v, beta, log_alpha, theta, turns[u - unit], b, h, start, tokens)
                    outputs(x, t, s, o, b, h, start, tokens)
                    advance(x, t, s, tokens)
                    keep_state(x, t.S, state, u * area, s)
                elif s.phases:
                    turn_state(state, u * area, turns[u - unit], np.float32(1), s)
        unit = stop


@njit(**OPTIONS)
def replay(x, t, s, q, k, v, beta, log_alpha, theta, b, h, slot, starts, place, kept, phases, turns, states, at):
    """The states before the chunks of the section that ends with the chunk `slot`, but the kept one, to `states[at:]`
    with room for that one."""
    home, area = slot + place[slot], 2 * s.m * s.V
    turns[:] = phases[home * s.m : (home + 1) * s.m]
    copy_state(x, t.S, kept, place[home] * area, s)
    for chunk in range(home, slot):
        start = starts[chunk]
        prepare(x, t, s, q, k, v, beta, log_alpha, theta, turns, b, h, start, starts[chunk + 1] - start)
        advance(x, t, s, starts[chunk + 1] - start)
        keep_state(x, t.S, states, at + (chunk + 1 - home) * area, s)


@kernel
def backward(q, k, v, beta, log_alpha, theta, do, dstate, dq, dk, dv, dbeta, dlog_alpha, dtheta,
             s, t, floats, begin, end, first, starts, place, kept, phases):  # fmt: skip
    """Units from `begin` to `end`: every gradient; `dstate`, of the last state, becomes that of the first."""
    x, turns = np.zeros(floats, np.float32), np.zeros(s.m, np.float64)
    area, depth = 2 * s.m * s.V, 1 - place.min()
    inside = np.empty(ABREAST * depth * area if depth > 1 else 0, np.float32)
    unit = begin
    while unit < end:
        stop, most = together(unit, end, s, first)
        for i in range(most):
            for u in range(unit, stop):
                last = first[u + 1] - 1
                slot = last - 1 - i
                if slot < first[u]:
                    continue
                if i == 0 and s.phases:
                    turn_state(dstate, u * area, phases[last * s.m : (last + 1) * s.m], np.float32(-1), s)
                b, h, start, tokens = u // s.H, u % s.H, starts[slot], starts[slot + 1] - starts[slot]
                if slot > first[u]:
                    look_ahead(s, b, h, starts[slot - 1], start, (q, k, dq, dk), (v, do, dv), theta)
                copy_state(x, t.G, dstate, u * area, s)
                section = (u - unit) * depth * area
                if place[slot + 1] >= 0:
                    through(x, t, s, tokens, kept, place[slot + 1] * area, s.V)
                    if place[slot] < 0:
                        replay(x, t, s, q, k, v, beta, log_alpha, theta, b, h, slot, starts, place, kept, phases, turns,
                               inside, section)  # fmt: skip
                else:
                    through(x, t, s, tokens, inside, section - place[slot + 1] * area, s.V)
                if place[slot] >= 0:
                    copy_state(x, t.S, kept, place[slot] * area, s)
                else:
                    copy_state(x, t.S, inside, section - place[slot] * area, s)
                turns[:] = phases[slot * s.m : (slot + 1) * s.m]
                prepare(x, t, s, q, k, v, beta, log_alpha, theta, turns, b, h, start, tokens)
                rescale(x, t.G, t.leave, s)
                pull(x, t, s, do, dv, b, h, start, tokens)
                settle(x, t, s, beta, dbeta, b, h, start, tokens)
                turn_back(x, t, s, t.q, t.dq, dq, 0, b, h, start, tokens)
                turn_back(x, t, s, t.k, t.dk, dk, 1, b, h, start, tokens)
                sum_up(x, t, s, dlog_alpha, dtheta, b, h, start, tokens)
                rescale(x, t.G, t.enter, s)
                keep_state(x, t.G, dstate, u * area, s)
        unit = stop
