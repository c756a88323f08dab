"""Whole sequences, chunk by chunk. A unit of work is one head of one batch row: unit = b H + h.

Legend: see workspace.py.

Each unit has its own chunk boundaries, so strong decay in one head does not slow the others. The forward pass keeps
the states before sections only, in the gauge without phase; a section is commonly one chunk. The backward pass
recomputes everything else with the code of the forward pass.
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
    """The end of the chunk of head h that starts at token `start`: MAX_ROWS, or fewer where decay exceeds the limit.

    The first token's decay acts on the state only, so it is not limited.
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
    """Divide all units into chunks. Returns (first, starts, kept_at, count).

    starts: the first token of every chunk, unit by unit; T ends each unit. first `[B H + 1]`: the slot of each unit's
    first chunk. kept_at, shaped like starts: the index of the kept state before a chunk or, for a chunk inside a
    section, minus the number of chunks since the start of the section. count: the number of kept states.
    """
    first = np.zeros(B * s.H + 1, np.int64)
    for unit in range(B * s.H):
        t, count = 0, 1
        while t < s.T:
            t = chunk_end(log_alpha, s, unit // s.H, unit % s.H, t)
            count += 1
        first[unit + 1] = first[unit] + count
    starts, kept_at, count = np.empty(first[-1], np.int64), np.empty(first[-1], np.int64), 0
    for unit in range(B * s.H):
        t = section_start = 0
        for slot in range(first[unit], first[unit + 1]):
            stop = chunk_end(log_alpha, s, unit // s.H, unit % s.H, t) if t < s.T else t
            starts[slot] = t
            if t == 0 or t == s.T or (stop - starts[section_start]) * s.r > MAX_ROWS:
                kept_at[slot], section_start, count = count, slot, count + 1
            else:
                kept_at[slot] = section_start - slot
            t = stop
    return first, starts, kept_at, count


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
def rotate_state(state, at, phase, sign, s):
    """Multiply the state `[2m, V]` at `state[at:]` by e^{2 pi i sign phase}, with the phase in turns."""
    for c in range(s.m):
        cos, sin = cos_sin(phase[c])
        sin *= sign
        row, other = at + c * s.V, at + (c + s.m) * s.V
        for j in range(s.V):
            re, im = get(state, row + j), get(state, other + j)
            put(state, row + j, re * cos - im * sin)
            put(state, other + j, re * sin + im * cos)


@njit(**OPTIONS)
def chunk_at(s, unit, starts, slot):
    """The chunk `slot` of a unit."""
    return Chunk(unit // s.H, unit % s.H, starts[slot], starts[slot + 1] - starts[slot])


@njit(**OPTIONS)
def group_end(unit, end, s, first):
    """The end of the group of units that starts with `unit`, and its largest number of chunks.

    A group is neighbouring heads of a batch row: their tokens are adjacent in memory.
    """
    stop, max_chunks = unit, 0
    while stop < end and stop // s.H == unit // s.H and stop - unit < GROUP:
        max_chunks = max(max_chunks, first[stop + 1] - first[stop] - 1)
        stop += 1
    return stop, max_chunks


@njit(**OPTIONS)
def prefetch_chunk(s, chunk, keys, values, theta):
    """Prefetch the inputs of a chunk."""
    first, tokens, K, V = token(s, chunk, 0), chunk.tokens, 2 * s.m, s.r * s.V
    for x in keys:
        prefetch(x, first * K, s.H * K, K, tokens)
    for x in values:
        prefetch(x, first * V, s.H * V, V, tokens)
    if s.has_phase:
        prefetch(theta, first * s.m, s.H * s.m, s.m, tokens)


@kernel
def forward(inputs, state, o, s, t, workspace_size, begin, end, chunks, kept_states, kept_phases):
    """Forward pass of the units from `begin` to `end`: outputs to o, and `state` from the first to the last state.

    If `kept_states` is not empty, it receives the states `[.., 2m, V]` of `chunks.kept_at`, and `kept_phases` `[.., m]`
    the running phase before every chunk and after the last one.
    """
    first, starts, kept_at = chunks
    x, phase = np.zeros(workspace_size, np.float32), np.zeros((GROUP, s.m), np.float64)
    state_size, keep = 2 * s.m * s.V, len(kept_states) > 0
    unit = begin
    while unit < end:
        stop, max_chunks = group_end(unit, end, s, first)
        phase[:] = 0
        for i in range(max_chunks + 1):
            for u in range(unit, stop):
                slot, count = first[u] + i, first[u + 1] - first[u] - 1
                if i > count:
                    continue
                load_state(x, t.S, state, u * state_size, s)
                if keep:
                    if kept_at[slot] >= 0:
                        store_state(x, t.S, kept_states, kept_at[slot] * state_size, s)
                    kept_phases[slot * s.m : (slot + 1) * s.m] = phase[u - unit]
                if i < count:
                    chunk = chunk_at(s, u, starts, slot)
                    if i + 1 < count:
                        following = chunk_at(s, u, starts, slot + 1)
                        prefetch_chunk(s, following, (inputs.q, inputs.k), (inputs.v,), inputs.theta)
                    prepare(x, t, s, inputs, phase[u - unit], chunk)
                    outputs(x, t, s, o, chunk)
                    advance(x, t, s, chunk)
                    store_state(x, t.S, state, u * state_size, s)
                elif s.has_phase:
                    rotate_state(state, u * state_size, phase[u - unit], np.float32(1), s)
        unit = stop


@njit(**OPTIONS)
def recompute_states(x, t, s, inputs, unit, slot, chunks, kept_states, kept_phases, phase, states, at):
    """Recompute the states inside the section that ends with the chunk `slot`, from the kept state before it.

    They are written to `states[at:]`, after a place for the kept state.
    """
    starts, kept_at = chunks.starts, chunks.kept_at
    section_start, state_size = slot + kept_at[slot], 2 * s.m * s.V
    phase[:] = kept_phases[section_start * s.m : (section_start + 1) * s.m]
    load_state(x, t.S, kept_states, kept_at[section_start] * state_size, s)
    for i in range(section_start, slot):
        chunk = chunk_at(s, unit, starts, i)
        prepare(x, t, s, inputs, phase, chunk)
        advance(x, t, s, chunk)
        store_state(x, t.S, states, at + (i + 1 - section_start) * state_size, s)


@kernel
def backward(inputs, grads, do, dstate, s, t, workspace_size, begin, end, chunks, kept_states, kept_phases):
    """Backward pass of the units `begin` to `end`: all gradients, and `dstate` from the last to the first state."""
    first, starts, kept_at = chunks
    x, phase = np.zeros(workspace_size, np.float32), np.zeros(s.m, np.float64)
    state_size, depth = 2 * s.m * s.V, 1 - kept_at.min()
    section_states = np.empty(GROUP * depth * state_size if depth > 1 else 0, np.float32)
    unit = begin
    while unit < end:
        stop, max_chunks = group_end(unit, end, s, first)
        for i in range(max_chunks):
            for u in range(unit, stop):
                last = first[u + 1] - 1
                slot = last - 1 - i
                if slot < first[u]:
                    continue
                if i == 0 and s.has_phase:
                    rotate_state(dstate, u * state_size, kept_phases[last * s.m : (last + 1) * s.m], np.float32(-1), s)
                chunk = chunk_at(s, u, starts, slot)
                if slot > first[u]:
                    previous, keys = chunk_at(s, u, starts, slot - 1), (inputs.q, inputs.k, grads.q, grads.k)
                    prefetch_chunk(s, previous, keys, (inputs.v, do, grads.v), inputs.theta)
                load_state(x, t.G, dstate, u * state_size, s)
                section = (u - unit) * depth * state_size
                if kept_at[slot + 1] >= 0:
                    state_terms(x, t, s, chunk.tokens, kept_states, kept_at[slot + 1] * state_size, s.V)
                    if kept_at[slot] < 0:
                        recompute_states(
                            x, t, s, inputs, u, slot, chunks, kept_states, kept_phases, phase, section_states, section
                        )
                else:
                    state_terms(x, t, s, chunk.tokens, section_states, section - kept_at[slot + 1] * state_size, s.V)
                if kept_at[slot] >= 0:
                    load_state(x, t.S, kept_states, kept_at[slot] * state_size, s)
                else:
                    load_state(x, t.S, section_states, section - kept_at[slot] * state_size, s)
                phase[:] = kept_phases[slot * s.m : (slot + 1) * s.m]
                prepare(x, t, s, inputs, phase, chunk)
                rescale(x, t.G, t.scale_out, s)
                chunk_gradients(x, t, s, do, grads.v, chunk)
                write_gradients(x, t, s, inputs.beta, grads.beta, chunk)
                input_gradients(x, t, s, t.q, t.dq, grads.q, 0, chunk)
                input_gradients(x, t, s, t.k, t.dk, grads.k, 1, chunk)
                gate_gradients(x, t, s, grads.log_alpha, grads.theta, chunk)
                rescale(x, t.G, t.scale_in, s)
                store_state(x, t.G, dstate, u * state_size, s)
        unit = stop
