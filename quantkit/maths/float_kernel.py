"""Compiled float32 products for AVX-512.

PyTorch gives float32 to MKL, which takes its AVX2 loops on processors of other makers: half the rate where AVX-512 is
there at full width. oneDNN's are as fast as these, but it compiles for each shape, and keeps what it compiled.

Rows of the right factor lie in panels of TILE_COLUMNS, so that a step along what is summed over is one step through
memory. A tile of TILE_ROWS x TILE_COLUMNS sums stays in registers: 24 of 32, four hold numbers of the right factor and
one a number of the left. Matrices are given as numbers in one piece and the steps between rows and columns, so that
parts of larger ones need no copy and each loop is compiled once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types  # type: ignore[import-untyped]
from numba.core import cgutils  # type: ignore[import-untyped]
from numba.extending import intrinsic  # type: ignore[import-untyped]
from numpy.typing import NDArray

from quantkit.maths.int_kernel import TILE_ROWS
from quantkit.maths.parallel import parallel
from quantkit.maths.vectors import SQUARE, data_of, in_all_lanes, pointer_at, turn_square

TILE_COLUMNS = 64

BLOCK_ROWS = 16 * TILE_ROWS
"""Rows of the left factor that one thread takes together: as many as serve a panel, which comes from memory."""

DEPTH = 384
"""Numbers that are summed before a sum goes to memory: so many of a panel, 98 KB, stay in the second-level cache."""

_LANES = 16
_FLOAT, _LONG = ir.FloatType(), ir.IntType(64)
_SUMS = ir.VectorType(_FLOAT, _LANES)


def adding(number: Any, word: Any, numbers: Any, name: str, *, sum_first: bool) -> Any:
    """The intrinsic (left, places, right, depth, sums, step) that writes a tile of sums: see `add_steps`.

    number: type of a number in left. word: of what is multiplied at once in each lane, one or more of them, and in
    right. numbers: a vector of words as the instruction wants it. name: of LLVM's intrinsic for that, which takes the
    sums so far first or last.
    """
    size = 1 if number is word else word.width // number.width

    def add(typing_context: Any, left: Any, places: Any, right: Any, depth: Any, sums: Any, step: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            left, places, right, sums = (
                data_of(context, builder, signature.args[at], args[at], kind)
                for at, kind in ((0, number), (1, _LONG), (2, word), (4, _FLOAT))
            )
            vectors = range(TILE_COLUMNS // _LANES)
            kinds = [_SUMS, numbers, numbers] if sum_first else [numbers, numbers, _SUMS]
            multiply = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_SUMS, kinds), name)
            none = ir.Constant(_SUMS, [0.0] * _LANES)
            found = [[cgutils.alloca_once_value(builder, none) for _ in vectors] for _ in range(TILE_ROWS)]
            starts = [builder.load(pointer_at(builder, places, row, _LONG)) for row in range(TILE_ROWS)]
            rows = [pointer_at(builder, left, start, word) for start in starts]
            words = builder.udiv(builder.add(args[3], ir.Constant(_LONG, size - 1)), ir.Constant(_LONG, size))
            with cgutils.for_range(builder, words) as loop:
                beside = builder.gep(right, [builder.mul(loop.index, ir.Constant(_LONG, TILE_COLUMNS))])
                columns = [builder.load(pointer_at(builder, beside, v * _LANES, numbers), align=4) for v in vectors]
                for row, own in zip(rows, found, strict=True):
                    one = builder.load(builder.gep(row, [loop.index]), align=4 // size)
                    spread = builder.bitcast(in_all_lanes(builder, one, _LANES), numbers)
                    for v in vectors:
                        pair, total = [spread, columns[v]], [builder.load(own[v])]
                        builder.store(builder.call(multiply, total + pair if sum_first else pair + total), own[v])
            for row, own in enumerate(found):
                there = builder.gep(sums, [builder.mul(args[5], ir.Constant(_LONG, row))])
                for v in vectors:
                    builder.store(builder.load(own[v]), pointer_at(builder, there, v * _LANES, _SUMS), align=4)
            return context.get_dummy_value()

        return types.void(left, places, right, depth, sums, types.intp), generate

    return intrinsic(add)


add_steps: Any = adding(_FLOAT, _FLOAT, _SUMS, "llvm.fma.v16f32", sum_first=False)
"""sums float32 [TILE_ROWS, TILE_COLUMNS] of left times right over `depth` numbers of each.

left: an array; places: int64 [TILE_ROWS], the numbers of it that rows begin at. right: part of a panel, [depth,
TILE_COLUMNS]. sums: an array, the rows of which begin `step` numbers apart.
"""


@njit  # type: ignore[untyped-decorator]
def lay_panel(right: NDArray[Any], begin: int, down: int, along: int, rows: int, panel: NDArray[Any]) -> None:
    """So many rows of a right factor as a panel [depth, TILE_COLUMNS]: number [n, k] is right[begin + n * down + k *
    along]; what is not there is 0."""
    depth = len(panel)
    if rows < TILE_COLUMNS:
        panel[:] = 0
    if down == 1:
        for step in range(depth):
            start = begin + step * along
            panel[step, :rows] = right[start : start + rows]
        return
    deep, wide = (depth - depth % SQUARE, rows - rows % SQUARE) if along == 1 else (0, 0)
    for row in range(0, wide, SQUARE):
        for step in range(0, deep, SQUARE):
            turn_square(right, begin + row * down + step, down, panel, step * TILE_COLUMNS + row, TILE_COLUMNS)
    for row in range(rows):
        for step in range(deep if row < wide else 0, depth):
            panel[step, row] = right[begin + row * down + step * along]


@parallel()
def lay_panels(
    low: int, high: int, right: NDArray[np.float32], down: int, along: int, rows: int, panels: NDArray[np.float32]
) -> None:
    """Rows of a right factor, of which number [n, k] is right[n * down + k * along], as panels [panels, k,
    TILE_COLUMNS]; what is not there is 0."""
    for at in range(low, high):
        first = at * TILE_COLUMNS
        lay_panel(right, first * down, down, along, min(TILE_COLUMNS, rows - first), panels[at])


@parallel()
def multiply_floats(
    low: int,
    high: int,
    left: NDArray[np.float32],
    left_step: int,
    panels: NDArray[np.float32],
    total: NDArray[np.float32],
    total_step: int,
    rows: int,
    columns: int,
    factor: np.float32,
    fresh: bool,
    tasks: int,
) -> None:
    """total += factor * products [rows, columns].

    left, total: their rows begin so many numbers apart. panels: of the right factor, by `lay_panels`. factor: 1 or -1.
    fresh: total holds nothing yet. tasks: of each block of rows.
    """
    depth = panels.shape[1]
    for task in range(low, high):
        block, share = task // tasks, task % tasks
        first, last = block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, rows)
        sums, places = np.empty((TILE_ROWS, TILE_COLUMNS), np.float32), np.empty(TILE_ROWS, np.int64)
        for step in range(0, max(depth, 1), DEPTH):
            steps = min(DEPTH, depth - step)
            for at in range(len(panels) * share // tasks, len(panels) * (share + 1) // tasks):
                begin = at * TILE_COLUMNS
                there = min(TILE_COLUMNS, columns - begin)
                for start in range(first, last, TILE_ROWS):
                    for row in range(TILE_ROWS):
                        places[row] = min(start + row, last - 1) * left_step + step
                    add_steps(left, places, panels[at, step:], steps, sums, TILE_COLUMNS)
                    for row in range(start, min(start + TILE_ROWS, last)):
                        place, found = row * total_step + begin, sums[row - start]
                        own = total[place : place + there]
                        if fresh and step == 0:
                            for column in range(there):
                                own[column] = factor * found[column]
                        else:
                            for column in range(there):
                                own[column] += factor * found[column]
