"""Compiled products of 8-bit integers by AVX-512's units for them, which multiply four neighbours and add them up.

One instruction multiplies 64 unsigned by 64 signed numbers and adds them to sixteen sums of 32 bits. So codes of the
right factor lie in panels, four of those that are added up side by side, and a step along what is summed over is one
step through memory. A tile of TILE_ROWS x TILE_COLUMNS sums stays in registers: 24 of 32, four hold numbers of the
right factor and one four of the left. Left codes are read where they lie, 128 larger, as the instruction wants them;
what that adds to a sum, the same for all rows, is taken off before. Sums may wrap around in between, which is exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types  # type: ignore[import-untyped]
from numba.core import cgutils  # type: ignore[import-untyped]
from numba.extending import intrinsic  # type: ignore[import-untyped]
from numpy.typing import NDArray

from quantkit.maths.float_bits import value_of
from quantkit.maths.gate_kernel import gate_row
from quantkit.maths.int_kernel import BLOCK_ROWS, TILE_ROWS, add_row, scale_row
from quantkit.maths.parallel import FASTMATH, long_and_short, parallel
from quantkit.maths.vectors import data_of, in_all_lanes, pointer_at

TILE_COLUMNS = 64

QUAD = 4
"""Numbers that are added up by one instruction."""

_TURNED = 16
"""Quads that are laid together, so that few lines of memory are read and written at once."""

_LANES = 16
_BYTE, _INT, _LONG = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_SUMS, _NUMBERS = ir.VectorType(_INT, _LANES), ir.VectorType(_BYTE, QUAD * _LANES)
_SIGNS = 0x80808080 - (1 << 32)
"""The highest bit of each of four codes: as unsigned numbers they are 128 larger when it is turned."""


def _add_quads(typing_context: Any, left: Any, places: Any, stride: Any, right: Any, quads: Any, sums: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        left, places, right, sums = (
            data_of(context, builder, signature.args[at], args[at], kind)
            for at, kind in ((0, _BYTE), (1, _LONG), (3, _INT), (5, _INT))
        )
        vectors = range(TILE_COLUMNS // _LANES)
        multiply = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_SUMS, [_SUMS, _NUMBERS, _NUMBERS]), "llvm.x86.avx512.vpdpbusd.512"
        )
        first = [builder.load(pointer_at(builder, right, v * _LANES, _SUMS), align=4) for v in vectors]
        found = [[cgutils.alloca_once_value(builder, first[v]) for v in vectors] for _ in range(TILE_ROWS)]
        rows = [builder.gep(left, [builder.load(pointer_at(builder, places, row, _LONG))]) for row in range(TILE_ROWS)]
        behind = builder.gep(right, [ir.Constant(_LONG, TILE_COLUMNS)])
        with cgutils.for_range(builder, args[4]) as loop:
            there = builder.mul(loop.index, args[2])
            beside = builder.gep(behind, [builder.mul(loop.index, ir.Constant(_LONG, TILE_COLUMNS))])
            numbers = [builder.load(pointer_at(builder, beside, v * _LANES, _NUMBERS), align=4) for v in vectors]
            for row, own in zip(rows, found, strict=True):
                quad = builder.load(builder.bitcast(builder.gep(row, [there]), _INT.as_pointer()), align=1)
                # one by one: LLVM comes to no end with the same of a vector
                quad = builder.xor(quad, ir.Constant(_INT, _SIGNS))
                quad = builder.bitcast(in_all_lanes(builder, quad, _LANES), _NUMBERS)
                for v in vectors:
                    builder.store(builder.call(multiply, [builder.load(own[v]), quad, numbers[v]]), own[v])
        for row, own in enumerate(found):
            for v in vectors:
                builder.store(
                    builder.load(own[v]), pointer_at(builder, sums, row * TILE_COLUMNS + v * _LANES, _SUMS), align=4
                )
        return context.get_dummy_value()

    return types.void(left, places, stride, right, quads, sums), generate


add_quads: Any = intrinsic(_add_quads)
"""sums int32 [TILE_ROWS, TILE_COLUMNS] of left times right over so many quads of codes.

left: an array that holds codes; places: int64 [TILE_ROWS], the bytes in it that rows begin at; stride: int64, bytes
from a quad to the next. right: a panel [1 + quads, TILE_COLUMNS], as `lay_rows` and `lay_rounded` make it.
"""


@parallel()
def lay_rows(low: int, high: int, codes: NDArray[np.int8], panels: NDArray[np.int32]) -> None:
    """Codes [rows, k], k a multiple of QUAD, as panels [panels, 1 + quads, TILE_COLUMNS] of a right factor: -128 times
    the sum of each row, then its codes; rows that are not there are 0."""
    rows, columns = codes.shape
    quads = columns // QUAD
    for at in range(low, high):
        panel, begin = panels[at], at * TILE_COLUMNS
        there = min(TILE_COLUMNS, rows - begin)
        if there < TILE_COLUMNS:
            panel[:] = 0
        for row in range(there):
            total = np.int32(0)
            for column in range(columns):
                total += np.int32(codes[begin + row, column])
            panel[0, row] = np.int32(-128) * total
        for start in range(0, quads, _TURNED):
            for row in range(there):
                words = codes[begin + row].view(np.int32)
                for quad in range(start, min(start + _TURNED, quads)):
                    panel[1 + quad, row] = words[quad]


@njit(inline="always")  # type: ignore[untyped-decorator]
def _lay_quad(
    first: NDArray[Any],
    second: NDArray[Any],
    third: NDArray[Any],
    fourth: NDArray[Any],
    inverse: NDArray[np.float32],
    own: NDArray[np.int32],
    total: NDArray[np.int32],
    width: int,
) -> None:
    """Codes of four tokens side by side, the first one lowest, of each column, and added to its total."""
    byte = np.int32(0xFF)
    for column in range(width):
        factor = inverse[column]
        a = np.int32(np.rint(value_of(first[column]) * factor))
        b = np.int32(np.rint(value_of(second[column]) * factor))
        c = np.int32(np.rint(value_of(third[column]) * factor))
        d = np.int32(np.rint(value_of(fourth[column]) * factor))
        own[column] = (a & byte) | (b & byte) << np.int32(8) | (c & byte) << np.int32(16) | d << np.int32(24)
        total[column] += (a + b) + (c + d)


@parallel()
def lay_rounded(
    low: int,
    high: int,
    rows: NDArray[Any],
    inverse: NDArray[np.float32],
    far: NDArray[np.bool_],
    begin: int,
    panels: NDArray[np.int32],
    sums: NDArray[np.int32],
) -> None:
    """8-bit codes `round(x * inverse)` of inputs [tokens, columns], as lines of panels [panels, 1 + quads,
    TILE_COLUMNS] from `begin` on; of tokens that are far [tokens], and of those and columns that are not there, 0.

    Steps are of _TURNED quads of tokens each: what is read lies in one piece, and what is written nearly so. sums:
    [steps, TILE_COLUMNS times panels] receives those of their codes by columns.
    """
    tokens, columns = rows.shape
    for step in range(low, high):
        nothing = np.zeros(columns, rows.dtype)
        for at in range(len(panels)):
            left = at * TILE_COLUMNS
            there = min(TILE_COLUMNS, columns - left)
            total = sums[step, left : left + TILE_COLUMNS]
            total[:] = 0
            for quad in range(step * _TURNED, min((step + 1) * _TURNED, (tokens + QUAD - 1) // QUAD)):
                own, top = panels[at, begin + quad], quad * QUAD
                first = nothing if far[top] else rows[top]
                second = rows[top + 1] if top + 1 < tokens and not far[top + 1] else nothing
                third = rows[top + 2] if top + 2 < tokens and not far[top + 2] else nothing
                fourth = rows[top + 3] if top + 3 < tokens and not far[top + 3] else nothing
                parts = (first[left:], second[left:], third[left:], fourth[left:])
                if there == TILE_COLUMNS:  # a number that is known, so that the loop is four vectors
                    _lay_quad(parts[0], parts[1], parts[2], parts[3], inverse[left:], own, total, TILE_COLUMNS)
                else:
                    own[there:] = 0
                    _lay_quad(parts[0], parts[1], parts[2], parts[3], inverse[left:], own, total, there)


def steps_of(quads: int) -> int:
    """How many steps `lay_rounded` takes for so many quads of tokens."""
    return -(-quads // _TURNED)


@njit(cache=True)  # type: ignore[untyped-decorator]
def take_offset(sums: NDArray[np.int32], panels: NDArray[np.int32]) -> None:
    """Take 128 times the sums of `lay_rounded` off the first lines of panels, which are what sums begin with."""
    for at in range(len(panels)):
        own = panels[at, 0]
        for step in range(len(sums)):
            part = sums[step, at * TILE_COLUMNS : (at + 1) * TILE_COLUMNS]
            for column in range(TILE_COLUMNS):
                own[column] -= np.int32(128) * part[column]


@parallel()
def multiply_quads(
    low: int,
    high: int,
    left: NDArray[np.int8],
    right: NDArray[np.int32],
    along: NDArray[np.float32],
    across: NDArray[np.float32],
    bias: NDArray[np.float32],
    outputs: NDArray[Any],
    gates: bool,
    tasks: int,
) -> None:
    """outputs = products * along[:, None] * across + bias, float32 or the bits of bfloat16 [m, n].

    left: [m, k], k a multiple of QUAD. right: n rows as panels, by `lay_rows`. along: [m]. across, bias: [n]. gates:
    whether outputs hold gates of a gated activation, and receive what it makes of these and of the above. tasks: of
    each block of rows.
    """
    rows, columns = outputs.shape
    quads = right.shape[1] - 1
    for task in range(low, high):
        block, share = task // tasks, task % tasks
        first, last = block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, rows)
        sums, places = np.empty((TILE_ROWS, TILE_COLUMNS), np.int32), np.empty(TILE_ROWS, np.int64)
        for at in range(len(right) * share // tasks, len(right) * (share + 1) // tasks):
            begin, end = at * TILE_COLUMNS, min((at + 1) * TILE_COLUMNS, columns)
            steps, offset = across[begin:end], bias[begin:end]
            for start in range(first, last, TILE_ROWS):
                for row in range(TILE_ROWS):
                    places[row] = min(start + row, last - 1) * left.shape[1]
                add_quads(left, places, QUAD, right[at], quads, sums)
                for row in range(start, min(start + TILE_ROWS, last)):
                    if gates:
                        gate_row(sums[row - start], along[row], steps, offset, outputs[row, begin:end])
                    else:
                        scale_row(sums[row - start], along[row], steps, offset, outputs[row, begin:end])


@parallel(FASTMATH)
def add_quad_panels(
    low: int,
    high: int,
    left: NDArray[np.int32],
    right: NDArray[np.int32],
    across: NDArray[np.float32],
    along: NDArray[np.float32],
    total: NDArray[np.float32],
    upper: bool,
    fresh: bool,
    tasks: int,
) -> None:
    """Add left^T right, scaled, to total [m, n].

    left, right: columns as panels, by `lay_rounded`. across, along: steps of their columns [m], [n]. upper: the upper
    triangle, and some of what is below it. fresh: nothing is in total yet. tasks: of each block of rows.
    """
    rows, columns = total.shape
    height = right.shape[1]
    blocks = -(-rows // BLOCK_ROWS)
    for task in range(low, high):
        block, share = long_and_short(task // tasks, blocks), task % tasks
        sums, places = np.empty((TILE_ROWS, TILE_COLUMNS), np.int32), np.empty(TILE_ROWS, np.int64)
        first, last = block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, rows)
        start = first // TILE_COLUMNS if upper else 0
        count = len(right) - start
        for at in range(start + count * share // tasks, start + count * (share + 1) // tasks):
            begin, end = at * TILE_COLUMNS, min((at + 1) * TILE_COLUMNS, columns)
            steps = along[begin:end]
            for top in range(first, min(last, end) if upper else last, TILE_ROWS):
                for row in range(TILE_ROWS):
                    column = min(top + row, last - 1)
                    line = column // TILE_COLUMNS * height + 1
                    places[row] = (line * TILE_COLUMNS + column % TILE_COLUMNS) * QUAD
                add_quads(left, places, QUAD * TILE_COLUMNS, right[at], height - 1, sums)
                for row in range(top, min(top + TILE_ROWS, last)):
                    add_row(sums[row - top], across[row], steps, total[row, begin:end], fresh)
