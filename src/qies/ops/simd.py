"""SIMD building blocks of the CPU kernels, compiled by numba: register-tiled matrix products, bfloat16, exp, cos, sin.

All functions take flat float32 arrays and offsets (`x + i * stride`), so a kernel's buffers are one allocation and no
views are created. There are no bounds checks; sizes must be multiples of ROWS and LANES. The vectors are LLVM's, so
this runs on every processor that numba supports. LANES and ROWS are chosen for 32 vector registers of 512 bits.

Legend: x an array; to, source, out, left, right offsets into it; a_row, b_row, step strides between rows.
"""

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from torch import Tensor

from qies.ops.compiled import OPTIONS

LANES = 16  # float32 numbers per vector
ROWS = 8  # rows of a matrix tile; its accumulators, ROWS x 2 vectors, stay in registers

_I64, _F32 = ir.IntType(64), ir.FloatType()
_VEC = ir.VectorType(_F32, LANES)


def _data(context, builder, kind, array):
    return context.make_array(kind)(context, builder, array).data


class _Vectors:
    """Loads, stores and broadcasts of float32 vectors at offsets of one array."""

    def __init__(self, builder, data) -> None:
        self.builder, self.data = builder, data
        self.fma_of = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_VEC, [_VEC] * 3), f"llvm.fma.v{LANES}f32"
        )

    def at(self, offset, step=None, count: int = 0):
        """offset + step * count."""
        return offset if count == 0 else self.builder.add(offset, self.builder.mul(step, _I64(count)))

    def _pointer(self, offset):
        return self.builder.bitcast(self.builder.gep(self.data, [offset]), _VEC.as_pointer())

    def load(self, offset):
        value = self.builder.load(self._pointer(offset))
        value.align = 4
        return value

    def store(self, value, offset) -> None:
        self.builder.store(value, self._pointer(offset)).align = 4

    def splat(self, scalar):
        undefined = ir.Constant(_VEC, ir.Undefined)
        first = self.builder.insert_element(undefined, scalar, ir.IntType(32)(0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(ir.IntType(32), LANES), None))

    def broadcast(self, offset):
        return self.splat(self.builder.load(self.builder.gep(self.data, [offset])))

    def fma(self, a, b, c):
        return self.builder.call(self.fma_of, [a, b, c])


def _product(builder, vectors, a, row, column, b, b_row, n, columns: int):
    """A B for A `[ROWS, n]` with strides row, column and B `[n, columns * LANES]`, as registers by (row, vector)."""
    sums = {(i, j): cgutils.alloca_once(builder, _VEC) for i in range(ROWS) for j in range(columns)}
    for acc in sums.values():  # LLVM promotes them to registers
        builder.store(ir.Constant(_VEC, None), acc)
    starts = [vectors.at(a, row, i) for i in range(ROWS)]
    with cgutils.for_range(builder, n, intp=_I64) as loop:
        line = builder.add(b, builder.mul(b_row, loop.index))
        rights = [vectors.load(builder.add(line, _I64(j * LANES))) for j in range(columns)]
        skip = builder.mul(column, loop.index)
        lefts = [vectors.broadcast(builder.add(start, skip)) for start in starts]
        for (i, j), acc in sums.items():
            builder.store(vectors.fma(lefts[i], rights[j], builder.load(acc)), acc)
    return {cell: builder.load(acc) for cell, acc in sums.items()}


def _places(builder, vectors, c, c_row, columns: int):
    """The offsets of the tile of C that `_product` gives."""
    lines = [vectors.at(c, c_row, i) for i in range(ROWS)]
    return {(i, j): builder.add(lines[i], _I64(j * LANES)) for i in range(ROWS) for j in range(columns)}


def _micro(columns: int):
    """C = sign A B, or C + sign A B, for one tile of ROWS x (columns * LANES)."""

    @intrinsic
    def micro(typing_context, x, a, row, column, b, b_row, c, c_row, n, sign, add):
        signature = types.void(x, *[types.int64] * 8, types.float32, types.boolean)

        def codegen(context, builder, sig, args):
            array, a, row, column, b, b_row, c, c_row, n, sign, add = args
            vectors = _Vectors(builder, _data(context, builder, sig.args[0], array))
            sums = _product(builder, vectors, a, row, column, b, b_row, n, columns)
            places, scale = _places(builder, vectors, c, c_row, columns), vectors.splat(sign)
            with builder.if_else(add) as (adding, replacing):
                with adding:
                    for cell, place in places.items():
                        vectors.store(vectors.fma(scale, sums[cell], vectors.load(place)), place)
                with replacing:
                    for cell, place in places.items():
                        vectors.store(builder.fmul(scale, sums[cell]), place)
            return context.get_dummy_value()

        return signature, codegen

    return micro


def _eliminate(columns: int, order: int):
    """C <- (I + D)^-1 (C - A B) for one tile, by substitution. D `[ROWS, ROWS]` has the strides of A.

    order: 1 for a strictly lower triangular D (forward substitution), -1 for strictly upper (back substitution).
    """

    @intrinsic
    def eliminate(typing_context, x, a, row, column, b, b_row, c, c_row, n, d):
        signature = types.void(x, *[types.int64] * 9)

        def codegen(context, builder, sig, args):
            array, a, row, column, b, b_row, c, c_row, n, d = args
            vectors = _Vectors(builder, _data(context, builder, sig.args[0], array))
            sums = _product(builder, vectors, a, row, column, b, b_row, n, columns)
            places = _places(builder, vectors, c, c_row, columns)
            done: list[int] = []
            rest = {cell: builder.fsub(vectors.load(place), sums[cell]) for cell, place in places.items()}
            for i in range(ROWS)[::order]:
                for p in done:
                    known = vectors.broadcast(builder.add(vectors.at(d, row, i), builder.mul(column, _I64(p))))
                    known = builder.fneg(known)
                    for j in range(columns):
                        rest[i, j] = vectors.fma(known, rest[p, j], rest[i, j])
                for j in range(columns):
                    vectors.store(rest[i, j], places[i, j])
                done.append(i)
            return context.get_dummy_value()

        return signature, codegen

    return eliminate


_wide, _narrow = _micro(2), _micro(1)
_wide_down, _narrow_down = _eliminate(2, 1), _eliminate(1, 1)
_wide_up, _narrow_up = _eliminate(2, -1), _eliminate(1, -1)

# The structure of A in `gemm`: dense, block lower triangular or block upper triangular, with the diagonal blocks.
FULL, LOWER, UPPER = 0, 1, 2


@njit(**OPTIONS)
def gemm(x, c, c_row, a, a_row, a_column, b, b_row, rows, columns, inner, sign, add, shape):
    """C = sign A B, or C += sign A B with `add`.

    A `[rows, inner]` has any strides; the rows of B and C are contiguous. rows is a multiple of ROWS, columns of LANES.
    shape (FULL, LOWER, UPPER): which blocks of A are skipped as zero.
    """
    for i in range(0, rows, ROWS):
        start = min(i, inner) if shape == UPPER else 0
        n = (min(i + ROWS, inner) if shape == LOWER else inner) - start
        left, right, out = a + i * a_row + start * a_column, b + start * b_row, c + i * c_row
        j = 0
        while j + 2 * LANES <= columns:
            _wide(x, left, a_row, a_column, right + j, b_row, out + j, c_row, n, sign, add)
            j += 2 * LANES
        if j < columns:
            _narrow(x, left, a_row, a_column, right + j, b_row, out + j, c_row, n, sign, add)


@njit(**OPTIONS)
def substitute(x, values, A, A_row, rows, columns):
    """values <- (I + A)^-1 values for a strictly lower triangular A, by substitution.

    An inverse would lose all digits when many keys are parallel.
    """
    for i in range(0, rows, ROWS):
        out, left = values + i * columns, A + i * A_row
        j = 0
        while j + 2 * LANES <= columns:
            _wide_down(x, left, A_row, 1, values + j, columns, out + j, columns, i, left + i)
            j += 2 * LANES
        if j < columns:
            _narrow_down(x, left, A_row, 1, values + j, columns, out + j, columns, i, left + i)


@njit(**OPTIONS)
def substitute_back(x, values, A, A_row, rows, columns):
    """values <- (I + A)^-T values, by substitution."""
    for i in range(rows - ROWS, -1, -ROWS):
        out, diagonal, n = values + i * columns, A + i * A_row + i, rows - ROWS - i
        left, right = diagonal + ROWS * A_row, out + ROWS * columns
        j = 0
        while j + 2 * LANES <= columns:
            _wide_up(x, left, 1, A_row, right + j, columns, out + j, columns, n, diagonal)
            j += 2 * LANES
        if j < columns:
            _narrow_up(x, left, 1, A_row, right + j, columns, out + j, columns, n, diagonal)


@intrinsic
def _transpose_block(typing_context, x, to, to_row, source, source_row):
    """Transpose LANES x LANES numbers in registers, by four rounds of interleaving rows i and i + LANES / 2."""

    def codegen(context, builder, sig, args):
        array, to, to_row, source, source_row = args
        vectors = _Vectors(builder, _data(context, builder, sig.args[0], array))
        rows = [vectors.load(vectors.at(source, source_row, i)) for i in range(LANES)]
        half = LANES // 2
        picks = [[(i // 2) + first + (LANES if i % 2 else 0) for i in range(LANES)] for first in (0, half)]
        masks = [ir.Constant(ir.VectorType(ir.IntType(32), LANES), pick) for pick in picks]
        for _ in range(LANES.bit_length() - 1):
            rows = [builder.shuffle_vector(rows[i // 2], rows[i // 2 + half], masks[i % 2]) for i in range(LANES)]
        for i, row in enumerate(rows):
            vectors.store(row, vectors.at(to, to_row, i))
        return context.get_dummy_value()

    return types.void(x, *[types.int64] * 4), codegen


@njit(**OPTIONS)
def transpose(x, to, to_row, source, source_row, rows, columns):
    """Write B^T to `to`, for B `[rows, columns]`, both multiples of LANES."""
    for i in range(0, rows, LANES):
        for j in range(0, columns, LANES):
            _transpose_block(x, to + j * to_row + i, to_row, source + i * source_row + j, source_row)


@intrinsic
def _raw(typing_context, x, i):
    """x[i] of an array that is not written meanwhile; LLVM is told so, and can vectorise loops."""

    def codegen(context, builder, sig, args):
        value = builder.load(builder.gep(_data(context, builder, sig.args[0], args[0]), [args[1]], inbounds=True))
        value.set_metadata("invariant.load", builder.module.add_metadata([]))
        return value

    return x.dtype(x, types.int64), codegen


@intrinsic
def get(typing_context, x, i):
    """x[i], without support for negative i."""

    def codegen(context, builder, sig, args):
        return builder.load(builder.gep(_data(context, builder, sig.args[0], args[0]), [args[1]], inbounds=True))

    return x.dtype(x, types.int64), codegen


@intrinsic
def put(typing_context, x, i, value):
    """x[i] = value, without support for negative i."""

    def codegen(context, builder, sig, args):
        builder.store(args[2], builder.gep(_data(context, builder, sig.args[0], args[0]), [args[1]], inbounds=True))
        return context.get_dummy_value()

    return types.void(x, types.int64, x.dtype), codegen


@intrinsic
def _prefetch(typing_context, x, i):
    """Prefetch the cache line of x[i]."""

    def codegen(context, builder, sig, args):
        flag = ir.IntType(32)
        address = builder.gep(_data(context, builder, sig.args[0], args[0]), [args[1]])
        kind = ir.FunctionType(ir.VoidType(), [address.type, flag, flag, flag])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(fetch, [address, flag(0), flag(2), flag(1)])
        return context.get_dummy_value()

    return types.void(x, types.int64), codegen


@njit(**OPTIONS)
def prefetch(x, at, step, width, rows):
    """Prefetch the rows `x[at + i * step:]` of `width` numbers. Their stride is too large for hardware prefetching."""
    line = 64 // x.itemsize
    for i in range(rows):
        for c in range(0, width, line):
            _prefetch(x, at + i * step + c)


def read(x, i):
    """x[i] as float32, of an array that the kernel does not write. uint16 holds the bits of bfloat16."""


def reread(x, i):
    """`read` of an array that the kernel also writes."""


def write(x, i, value):
    """x[i] = value (float32), rounded to nearest even if x is uint16 (the bits of bfloat16)."""


@overload(read, jit_options=OPTIONS)
def _read(x, i):
    if x.dtype == types.uint16:
        return lambda x, i: np.uint32(np.uint32(_raw(x, i)) << 16).view(np.float32)
    return lambda x, i: np.float32(_raw(x, i))


@overload(reread, jit_options=OPTIONS)
def _reread(x, i):
    if x.dtype == types.uint16:
        return lambda x, i: np.uint32(np.uint32(get(x, i)) << 16).view(np.float32)
    return lambda x, i: np.float32(get(x, i))


@overload(write, jit_options=OPTIONS)
def _write(x, i, value):
    if x.dtype == types.uint16:

        def rounded(x, i, value):
            bits = np.float32(value).view(np.uint32)
            even = np.uint32(np.uint32(bits + 0x7FFF) + ((bits >> 16) & 1)) >> 16
            put(x, i, np.uint16(even) if value == value else np.uint16(0x7FC0))

        return rounded
    return lambda x, i, value: put(x, i, value)


@njit(**{**OPTIONS, "fastmath": {"contract"}})  # not "reassoc", which may undo the two-step reduction of the range
def exp(x):
    """e^x in float32 for x <= 60, to rounding error; 0 below -87, NaN for NaN. A Taylor polynomial without branches, so
    loops vectorise."""
    n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    n = max(n, np.float32(-126))
    y = (x - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)
    p = y * np.float32(1 / 5040) + np.float32(1 / 720)
    p = ((p * y + np.float32(1 / 120)) * y + np.float32(1 / 24)) * y + np.float32(1 / 6)
    p = ((p * y + np.float32(1 / 2)) * y + np.float32(1)) * y + np.float32(1)
    power = np.int32((np.int32(n) + 127) << 23).view(np.float32)
    return np.float32(0) if x <= np.float32(-87) else p * power


@njit(**OPTIONS)
def cos_sin(turns):
    """cos and sin of 2 pi turns in float32, for turns (float64) in [0, 1]. Taylor polynomials up to a quarter turn."""
    x = np.float32(turns - 1.0 if turns > 0.5 else turns)
    far = abs(x) > np.float32(0.25)
    x = ((np.float32(0.5) if x > 0 else np.float32(-0.5)) - x) if far else x
    y = x * np.float32(2 * np.pi)
    z = y * y
    s = (z * np.float32(-1 / 39916800) + np.float32(1 / 362880)) * z + np.float32(-1 / 5040)
    s = ((s * z + np.float32(1 / 120)) * z + np.float32(-1 / 6)) * z + np.float32(1)
    c = (z * np.float32(1 / 479001600) + np.float32(-1 / 3628800)) * z + np.float32(1 / 40320)
    c = ((c * z + np.float32(-1 / 720)) * z + np.float32(1 / 24)) * z + np.float32(-1 / 2)
    c = c * z + np.float32(1)
    return (-c if far else c), s * y


def flat(x: Tensor | None) -> np.ndarray:
    """A CPU tensor as a flat array for a kernel: bfloat16 as its bits in uint16, other dtypes as float32. Copies if
    needed. None gives an empty array."""
    if x is None:
        return np.empty(0, np.float32)
    x = x.detach().resolve_neg().to(working(x)).contiguous().view(-1)
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def working(x: Tensor) -> torch.dtype:
    """The dtype in which a kernel reads x."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
