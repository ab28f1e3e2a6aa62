"""Compiled products of 8-bit integers for processors without units for them: AVX2's pairs of 16-bit integers.

One instruction multiplies sixteen 16-bit integers and adds neighbours up as eight 32-bit ones, twice as many products
as one of float32 has, and exact. So codes are widened and laid in panels: the two numbers that are added up lie side by
side, and a step along what is summed over is one step through memory. A tile of TILE_ROWS x TILE_COLUMNS sums stays in
registers: twelve of sixteen, two hold numbers of the right factor, one a pair of the left.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types  # type: ignore[import-untyped]
from numba.core import cgutils  # type: ignore[import-untyped]
from numba.extending import intrinsic  # type: ignore[import-untyped]
from numpy.typing import NDArray

from quantkit.maths.float_bits import stored_as
from quantkit.maths.parallel import FASTMATH, long_and_short, parallel
from quantkit.maths.vectors import data_of, in_all_lanes, pointer_at

TILE_ROWS = 6
TILE_COLUMNS = 16

BLOCK_ROWS = 8 * TILE_ROWS
"""Rows of the left factor that one thread takes together: a panel of the right one, which comes from farther away,
serves eight tiles, and the rows stay in the second-level cache (512 KB hold 48 rows of 5461 numbers)."""

TASKS = 4
"""What each thread gets at least, so that none waits long for another."""

_LANES = 8
_INT, _LONG = ir.IntType(32), ir.IntType(64)
_SUMS, _NUMBERS = ir.VectorType(_INT, _LANES), ir.VectorType(ir.IntType(16), 2 * _LANES)


def _add_pairs(typing_context: Any, left: Any, right: Any, pairs: Any, sums: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        left, right, sums = (data_of(context, builder, signature.args[i], args[i], _INT) for i in (0, 1, 3))
        vectors = range(TILE_COLUMNS // _LANES)
        multiply = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_SUMS, [_NUMBERS, _NUMBERS]), "llvm.x86.avx2.pmadd.wd"
        )
        zeros = ir.Constant(_SUMS, [0] * _LANES)
        found = [[cgutils.alloca_once_value(builder, zeros) for _ in vectors] for _ in range(TILE_ROWS)]

        with cgutils.for_range(builder, args[2]) as loop:
            here = builder.gep(left, [builder.mul(loop.index, ir.Constant(_LONG, TILE_ROWS))])
            beside = builder.gep(right, [builder.mul(loop.index, ir.Constant(_LONG, TILE_COLUMNS))])
            numbers = [builder.load(pointer_at(builder, beside, v * _LANES, _NUMBERS), align=4) for v in vectors]
            for row, own in enumerate(found):
                pair = in_all_lanes(builder, builder.load(pointer_at(builder, here, row, _INT)), _LANES)
                pair = builder.bitcast(pair, _NUMBERS)
                for v in vectors:
                    builder.store(builder.add(builder.load(own[v]), builder.call(multiply, [pair, numbers[v]])), own[v])
        for row, own in enumerate(found):
            for v in vectors:
                builder.store(
                    builder.load(own[v]), pointer_at(builder, sums, row * TILE_COLUMNS + v * _LANES, _SUMS), align=4
                )
        return context.get_dummy_value()

    return types.void(left, right, types.intp, sums), generate


add_pairs: Any = intrinsic(_add_pairs)
"""sums int32 [TILE_ROWS, TILE_COLUMNS] of left [pairs, TILE_ROWS] times right [pairs, TILE_COLUMNS], over pairs and
both numbers of each; all in one piece, two 16-bit integers in each int32 of left and right."""


@njit(inline="always")  # type: ignore[untyped-decorator]
def _pair(first: np.int8, second: np.int8) -> np.int32:
    """Two codes as neighbours of 16 bits each, the first one lower."""
    return (np.int32(second) << np.int32(16)) | (np.int32(first) & np.int32(0xFFFF))


@njit(inline="always")  # type: ignore[untyped-decorator]
def _lay_rows(codes: NDArray[np.int8], panel: NDArray[np.int32]) -> None:
    """Rows of codes [at most width, k] into a panel [pairs, width]; what is not there is 0."""
    rows, columns = codes.shape
    whole = columns // 2
    if rows < panel.shape[1]:
        panel[:] = 0
    for row in range(rows):
        own = codes[row]
        for pair in range(whole):
            panel[pair, row] = _pair(own[2 * pair], own[2 * pair + 1])
        if columns % 2:
            panel[whole, row] = _pair(own[columns - 1], np.int8(0))


@parallel()
def lay_rows(low: int, high: int, codes: NDArray[np.int8], panels: NDArray[np.int32]) -> None:
    """Codes [rows, k] as panels [panels, pairs, TILE_COLUMNS] of a right factor."""
    for at in range(low, high):
        _lay_rows(codes[at * TILE_COLUMNS : (at + 1) * TILE_COLUMNS], panels[at])


@njit(inline="always")  # type: ignore[untyped-decorator]
def scale_row(
    found: NDArray[np.int32],
    factor: np.float32,
    steps: NDArray[np.float32],
    offset: NDArray[np.float32],
    output: NDArray[Any],
) -> None:
    """output = found * factor * steps + offset, float32 or the bits of bfloat16; all but `found`, which may have more,
    [columns]."""
    for column in range(len(output)):
        output[column] = stored_as(np.float32(found[column]) * factor * steps[column] + offset[column], output[column])


@njit(inline="always")  # type: ignore[untyped-decorator]
def add_row(
    found: NDArray[np.int32], factor: np.float32, steps: NDArray[np.float32], own: NDArray[np.float32], fresh: bool
) -> None:
    """own += found * factor * steps; all but `found`, which may have more, [columns]. fresh: `own` holds nothing."""
    if fresh:
        own[:] = 0.0
    for column in range(len(own)):
        own[column] += np.float32(found[column]) * factor * steps[column]


def blocks_of(rows: int, height: int = BLOCK_ROWS) -> int:
    """How many blocks of rows there are."""
    return -(-rows // height)


def tasks_of_block(rows: int, threads: int, height: int = BLOCK_ROWS) -> int:
    """Into how many tasks the columns of a block of rows are divided, where so many rows have too few blocks."""
    return -(-TASKS * threads // max(1, blocks_of(rows, height)))


@parallel()
def multiply_panels(
    low: int,
    high: int,
    left: NDArray[np.int8],
    right: NDArray[np.int32],
    along: NDArray[np.float32],
    across: NDArray[np.float32],
    bias: NDArray[np.float32],
    outputs: NDArray[Any],
    tasks: int,
) -> None:
    """outputs = products * along[:, None] * across + bias, float32 or the bits of bfloat16 [m, n].

    left: [m, k]. right: n rows as panels [panels, pairs, TILE_COLUMNS]. along: [m]. across, bias: [n]. tasks: of each
    block of rows.
    """
    rows, columns = outputs.shape
    pairs = right.shape[1]
    for task in range(low, high):
        block, share = task // tasks, task % tasks
        first, last = block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, rows)
        tiles = -(-(last - first) // TILE_ROWS)
        panels = np.empty((tiles, pairs, TILE_ROWS), np.int32)
        sums = np.empty((TILE_ROWS, TILE_COLUMNS), np.int32)
        for tile in range(tiles):
            start = first + tile * TILE_ROWS
            _lay_rows(left[start : min(start + TILE_ROWS, last)], panels[tile])
        for at in range(len(right) * share // tasks, len(right) * (share + 1) // tasks):
            begin, end = at * TILE_COLUMNS, min((at + 1) * TILE_COLUMNS, columns)
            steps, offset = across[begin:end], bias[begin:end]
            for start in range(first, last, TILE_ROWS):
                add_pairs(panels[(start - first) // TILE_ROWS], right[at], pairs, sums)
                for row in range(start, min(start + TILE_ROWS, last)):
                    scale_row(sums[row - start], along[row], steps, offset, outputs[row, begin:end])


@njit(inline="always")  # type: ignore[untyped-decorator]
def _lay_columns(codes: NDArray[np.int8], begin: int, panel: NDArray[np.int32], width: int) -> None:
    """Columns of codes [k, n] from `begin` on into a panel [pairs, width]; what is not there is 0."""
    tokens, columns = codes.shape
    there = min(width, columns - begin)
    if there < width:
        panel[:] = 0
    for pair in range(tokens // 2):
        own, first, second = panel[pair], codes[2 * pair, begin:], codes[2 * pair + 1, begin:]
        if there == width:  # a number that is known, so that the loop is one or two vectors
            for column in range(width):
                own[column] = _pair(first[column], second[column])
        else:
            for column in range(there):
                own[column] = _pair(first[column], second[column])
    if tokens % 2:
        for column in range(there):
            panel[tokens // 2, column] = _pair(codes[tokens - 1, begin + column], np.int8(0))


@parallel()
def lay_left(low: int, high: int, codes: NDArray[np.int8], panels: NDArray[np.int32]) -> None:
    """Columns of codes [k, m] as panels [panels, pairs, TILE_ROWS] of a left factor."""
    for at in range(low, high):
        _lay_columns(codes, at * TILE_ROWS, panels[at], TILE_ROWS)


@parallel()
def lay_right(low: int, high: int, codes: NDArray[np.int8], panels: NDArray[np.int32]) -> None:
    """Columns of codes [k, n] as panels [panels, pairs, TILE_COLUMNS] of a right factor."""
    for at in range(low, high):
        _lay_columns(codes, at * TILE_COLUMNS, panels[at], TILE_COLUMNS)


@parallel(FASTMATH)
def add_panels(
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

    left, right: columns as panels of TILE_ROWS and of TILE_COLUMNS. across, along: steps of their columns [m], [n].
    upper: the upper triangle, and some of what is below it. fresh: nothing is in total yet. tasks: of each block of
    rows.
    """
    rows, columns = total.shape
    blocks = -(-rows // BLOCK_ROWS)
    for task in range(low, high):
        block, share = long_and_short(task // tasks, blocks), task % tasks
        sums = np.empty((TILE_ROWS, TILE_COLUMNS), np.int32)
        first, last = block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, rows)
        start = first // TILE_COLUMNS if upper else 0
        count = len(right) - start
        for at in range(start + count * share // tasks, start + count * (share + 1) // tasks):
            begin, end = at * TILE_COLUMNS, min((at + 1) * TILE_COLUMNS, columns)
            steps = along[begin:end]
            for top in range(first, min(last, end) if upper else last, TILE_ROWS):
                add_pairs(left[top // TILE_ROWS], right[at], right.shape[1], sums)
                for row in range(top, min(top + TILE_ROWS, last)):
                    add_row(sums[row - top], across[row], steps, total[row, begin:end], fresh)
