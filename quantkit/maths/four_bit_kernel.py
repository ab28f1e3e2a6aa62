"""Compiled products of inputs in 8 bits and weights in at most 4, for processors with AVX2 and no units for integers.

One instruction multiplies 32 pairs of bytes, unsigned by signed, and adds neighbours up in 16 bits: twice as many as
there are of 16-bit integers (`maths/int_kernel.py`). Their sums fit where weights have 4 bits and inputs are held to a
sum: 15 times the codes of a lane's columns stay below 2^15. So a run of columns, 64 of them or 32, is summed up in 16
bits; then it is multiplied with the run's step of the inputs and its scale of the weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types  # type: ignore[import-untyped]
from numba.core import cgutils  # type: ignore[import-untyped]
from numba.extending import intrinsic  # type: ignore[import-untyped]
from numpy.typing import NDArray

from quantkit.maths.float_bits import MAGNITUDE, bits_of, from_bits, stored_as, value_of
from quantkit.maths.int_kernel import BLOCK_ROWS, TILE_COLUMNS, TILE_ROWS
from quantkit.maths.parallel import parallel
from quantkit.maths.vectors import data_of, in_all_lanes, pointer_at

LARGEST_CODE = 15
"""Of a weight."""

LANE_SUM = (2**15 - 1) // LARGEST_CODE
"""What the magnitudes of the input codes that come to one 16-bit lane may add up to: of four columns side by side, two
go to one lane and two to its neighbour."""

_LANES = 8
_INT, _LONG, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_BYTES, _SHORTS = ir.VectorType(ir.IntType(8), 4 * _LANES), ir.VectorType(ir.IntType(16), 2 * _LANES)
_SUMS, _NUMBERS = ir.VectorType(_INT, _LANES), ir.VectorType(_FLOAT, _LANES)
_FUSED = ("contract",)


def _add_runs(
    typing_context: Any, codes: Any, steps: Any, sums: Any, rows: Any, right: Any, scale: Any, offset: Any, found: Any
) -> Any:
    given = (codes, steps, sums, rows, right, scale, offset, found)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def array(at: int) -> Any:
            return context.make_array(given[at])(context, builder, args[at])

        def data(at: int, kind: Any) -> Any:
            return data_of(context, builder, given[at], args[at], kind)

        def number(value: int) -> Any:
            return ir.Constant(_LONG, value)

        def rows_from(start: Any, width: Any) -> list[Any]:
            """Where the rows of the tile start; for one that is not there the last one is taken once more."""
            last = builder.sub(args[3], number(1))
            places = (builder.select(builder.icmp_signed("<", number(row), last), number(row), last) for row in tile)
            return [builder.gep(start, [builder.mul(place, width)]) for place in places]

        tile, parts = range(TILE_ROWS), range(0, TILE_COLUMNS, _LANES)
        each = [(row, part) for row in tile for part in parts]
        fours, runs = (builder.extract_value(array(at).shape, 0) for at in (4, 5))
        length = builder.sdiv(fours, runs)
        weights, scales, offsets = data(4, _INT), data(5, _FLOAT), data(6, _FLOAT)
        inputs = data(0, _INT)
        step_rows, sum_rows = (rows_from(data(at, _FLOAT), runs) for at in (1, 2))
        multiply, widen = (
            cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [kind, kind]), name)
            for name, result, kind in (
                ("llvm.x86.avx2.pmadd.ub.sw", _SHORTS, _BYTES),
                ("llvm.x86.avx2.pmadd.wd", _SUMS, _SHORTS),
            )
        )
        totals = {own: cgutils.alloca_once_value(builder, ir.Constant(_NUMBERS, [0.0] * _LANES)) for own in each}
        stacks = {own: cgutils.alloca_once(builder, _SHORTS) for own in each}
        with cgutils.for_range(builder, runs) as run:
            for stack in stacks.values():
                builder.store(ir.Constant(_SHORTS, [0] * 2 * _LANES), stack)
            with cgutils.for_range(builder, length) as loop:
                four = builder.add(builder.mul(run.index, length), loop.index)
                here = builder.mul(four, number(TILE_COLUMNS))
                beside = {
                    part: builder.load(pointer_at(builder, weights, builder.add(here, number(part)), _BYTES), align=4)
                    for part in parts
                }
                places = [builder.add(builder.mul(four, number(TILE_ROWS)), number(row)) for row in tile]
                taken = [in_all_lanes(builder, builder.load(builder.gep(inputs, [place])), _LANES) for place in places]
                taken = [builder.bitcast(value, _BYTES) for value in taken]
                for (row, part), stack in stacks.items():
                    product = builder.call(multiply, [beside[part], taken[row]])
                    builder.store(builder.add(builder.load(stack), product), stack)
            here = builder.mul(run.index, number(TILE_COLUMNS))
            for (row, part), total in totals.items():
                scale, offset = (
                    builder.load(pointer_at(builder, start, builder.add(here, number(part)), _NUMBERS), align=4)
                    for start in (scales, offsets)
                )
                step, share = (
                    in_all_lanes(builder, builder.load(builder.gep(starts[row], [run.index])), _LANES)
                    for starts in (step_rows, sum_rows)
                )
                sums = builder.call(widen, [builder.load(stacks[row, part]), ir.Constant(_SHORTS, [1] * 2 * _LANES)])
                product = builder.fmul(builder.sitofp(sums, _NUMBERS), builder.fmul(scale, step), flags=_FUSED)
                value = builder.fadd(builder.load(total), product, flags=_FUSED)
                builder.store(builder.fsub(value, builder.fmul(offset, share, flags=_FUSED), flags=_FUSED), total)
        for (row, part), total in totals.items():
            place = pointer_at(builder, data(7, _FLOAT), row * TILE_COLUMNS + part, _NUMBERS)
            builder.store(builder.load(total), place, align=4)
        return context.get_dummy_value()

    return types.void(*(types.intp if at == 3 else kind for at, kind in enumerate(given))), generate


add_runs: Any = intrinsic(_add_runs)
"""found float32 [TILE_ROWS, TILE_COLUMNS] of the first rows, so many, of an input times weights, all in one piece.

codes: int32 [in / 4, TILE_ROWS], four int8 in each. steps: float32 [rows, runs], of the inputs. sums: float32
[rows, runs], step times the codes' sum. right: int32 [in / 4, TILE_COLUMNS], four uint8 in each. scale, offset: float32
[runs, TILE_COLUMNS], offset being scale times zero.
"""


@parallel()
def multiply_runs(
    low: int,
    high: int,
    codes: NDArray[np.int32],
    steps: NDArray[np.float32],
    sums: NDArray[np.float32],
    right: NDArray[np.int32],
    scale: NDArray[np.float32],
    offset: NDArray[np.float32],
    bias: NDArray[np.float32],
    outputs: NDArray[Any],
    tasks: int,
) -> None:
    """outputs = inputs @ weight.T + bias, float32 or the bits of bfloat16 [m, n].

    codes, steps, sums: of inputs, as `round_runs` gives them, [m, in / 4] with four codes in each and [m, runs]. right:
    n rows of weights as panels [panels, in / 4, TILE_COLUMNS] of four codes each. scale, offset:
    [panels, runs, TILE_COLUMNS]. bias: [n]. tasks: of each block of rows.
    """
    rows, columns = outputs.shape
    fours = right.shape[1]
    for task in range(low, high):
        block, share = task // tasks, task % tasks
        first, last = block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, rows)
        tiles = -(-(last - first) // TILE_ROWS)
        panels = np.empty((tiles, fours, TILE_ROWS), np.int32)
        found = np.empty((TILE_ROWS, TILE_COLUMNS), np.float32)
        for row in range(first, last):
            panel, lane = panels[(row - first) // TILE_ROWS], (row - first) % TILE_ROWS
            for four in range(fours):
                panel[four, lane] = codes[row, four]
        for at in range(len(right) * share // tasks, len(right) * (share + 1) // tasks):
            begin, end = at * TILE_COLUMNS, min((at + 1) * TILE_COLUMNS, columns)
            own = bias[begin:end]
            for tile in range(tiles):
                start = first + tile * TILE_ROWS
                there = min(TILE_ROWS, last - start)
                add_runs(panels[tile], steps[start:], sums[start:], there, right[at], scale[at], offset[at], found)
                for row in range(there):
                    output, total = outputs[start + row, begin:end], found[row]
                    if end - begin == TILE_COLUMNS:  # a number that is known, so that the loop is two vectors
                        for column in range(TILE_COLUMNS):
                            output[column] = stored_as(total[column] + own[column], output[column])
                    else:
                        for column in range(end - begin):
                            output[column] = stored_as(total[column] + own[column], output[column])


@njit(inline="always")  # type: ignore[untyped-decorator]
def _code_run(row: NDArray[Any], inverse: np.float32, code: NDArray[np.int8]) -> Any:
    """Codes of a run; their sum, and what the magnitudes of one lane add up to, the larger one of both."""
    total = everywhere = even = np.int32(0)  # numba would add 32 bits up in 64, half as many at a time
    for j in range(len(row)):
        found = np.int32(np.rint(value_of(row[j]) * inverse))
        code[j] = np.int8(found)
        size = np.int32(abs(found))
        total = np.int32(total + found)
        everywhere = np.int32(everywhere + size)
        even = np.int32(even + (size if np.int32(j) & np.int32(2) == 0 else np.int32(0)))
    return total, max(even, np.int32(everywhere - even))


@parallel()
def round_runs(
    low: int,
    high: int,
    rows: NDArray[Any],
    codes: NDArray[np.int8],
    steps: NDArray[np.float32],
    sums: NDArray[np.float32],
) -> None:
    """Codes `round(x / step)` from -127 to 127 of each token [tokens, in], the step of each run of its columns and the
    step times the sum of its codes [tokens, runs].

    Steps are larger where the magnitudes of a lane would add up to more than LANE_SUM. A run that is not finite gets a
    step that is not.
    """
    length = rows.shape[1] // steps.shape[1]
    for i in range(low, high):
        for run in range(steps.shape[1]):
            row, code = rows[i, run * length : (run + 1) * length], codes[i, run * length : (run + 1) * length]
            largest_bits = np.int32(0)  # magnitudes are in the order of their bits, those that are not finite last
            for j in range(length):
                largest_bits = max(largest_bits, bits_of(value_of(row[j])) & MAGNITUDE)
            largest = from_bits(largest_bits)
            inverse, step = np.float32(0.0), largest / np.float32(127.0)
            if np.float32(1e-30) < largest < np.inf:
                inverse = np.float32(127.0) / largest
            total = np.int32(0)
            for _ in range(2):  # once more where it has to be coarser; a call in one place is compiled in half the time
                total, lane = _code_run(row, inverse, code)
                if lane <= LANE_SUM:
                    break
                rounded = length // 4  # half a step for each of the lane's columns
                inverse *= np.float32(LANE_SUM - rounded) / np.float32(lane + rounded)
                step = np.float32(1.0) / inverse
            steps[i, run] = step
            sums[i, run] = step * np.float32(total)
