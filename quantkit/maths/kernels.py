"""Compiled loops for the CPU, where a column of a block depends on the one before and no tensor operation helps.

Inner loops run over slices from 0: numba lets an index that might be negative count from the end, and a loop with such
an index is not vectorized (three times slower here).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit  # type: ignore[import-untyped]
from numpy.typing import NDArray

from quantkit.maths.lane_products import LANES, add_products
from quantkit.maths.lane_sum import lane_sum
from quantkit.maths.parallel import FASTMATH, parallel

STRIP = 16
"""Columns over which `best_range_by_blocks` wants its matrices folded."""


def bands_of(rows: int) -> int:
    """How many steps LANES rows of a weight at a time are. They go through a block of columns together, as lanes of the
    vectors: a column waits for the one before it, and one number of a matrix serves all rows. A few vectors wide, and a
    block of columns stays near the first-level cache."""
    return -(-rows // LANES)


@njit  # type: ignore[untyped-decorator]
def _fill(lanes: NDArray[np.float32], number: float) -> None:
    """lanes[:] = number, which numba takes longer to compile."""
    for i in range(lanes.size):
        lanes[i] = number


@njit  # type: ignore[untyped-decorator]
def _copy(lanes: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    for i in range(lanes.size):
        out[i] = lanes[i]


@njit  # type: ignore[untyped-decorator]
def _turn(rows: NDArray[Any], lanes: NDArray[np.float32]) -> None:
    """rows [n, columns] into lanes [columns, at least n]."""
    for i in range(rows.shape[0]):
        row = rows[i]
        for j in range(row.size):
            lanes[j, i] = row[j]


@parallel(FASTMATH)
def round_block(
    low: int,
    high: int,
    weight: NDArray[np.float32],
    owed: NDArray[np.float32],
    scale: NDArray[np.float32],
    middle: NDArray[np.float32],
    group: NDArray[np.int64],
    lower: NDArray[np.float32],
    levels: int,
    codes: NDArray[np.uint8],
    errors: NDArray[np.float32],
) -> None:
    """GPTQ's inner loop over one block of columns; rows are independent and run in parallel.

    weight: [out, columns]. owed: [out, columns], what the errors of blocks before this one add to those of its columns
    by the factor. scale, middle: [groups, out]; group: [columns], the group of each column. lower: [columns, columns],
    the block of the factor with rows and columns exchanged. codes and errors [out, columns] receive the result, errors
    the weight less what its codes stand for. Sums run in one fixed order a row, so the result does not depend on the
    threads.
    """
    rows, columns = weight.shape
    top = np.float32(levels - 1)
    for band in range(low, high):
        first, end = band * LANES, min((band + 1) * LANES, rows)
        values, error = np.empty((columns, LANES), np.float32), np.empty((columns, LANES), np.float32)
        code, pulls = np.empty((columns, LANES), np.uint8), np.empty((columns, LANES), np.float32)
        _turn(weight[first:end], values)
        _turn(owed[first:end], pulls)
        for j in range(columns):
            pulled = pulls[j]
            add_products(lower[j, :j], error[:j], pulled)
            inverse = np.float32(1.0) / lower[j, j]
            step, zero = scale[group[j], first:end], middle[group[j], first:end]
            value, off, chosen = values[j], error[j], code[j]
            for i in range(step.size):
                level = np.rint((value[i] + pulled[i] * inverse) / step[i] + zero[i])
                level = min(max(level, np.float32(0.0)), top)
                chosen[i] = np.uint8(level)
                off[i] = value[i] - (level - zero[i]) * step[i]
        for i in range(end - first):
            own_code, own_error = codes[first + i], errors[first + i]
            for j in range(columns):
                own_code[j], own_error[j] = code[j, i], error[j, i]


@njit(inline="always")  # type: ignore[untyped-decorator]
def _as_float16(value: float) -> np.float32:
    """A positive number rounded to the 11 significant bits of float16, half to even; subnormals on their own grid."""
    mantissa, exponent = math.frexp(value)
    bits = 11 if exponent >= -13 else 24 + exponent
    return np.float32(math.ldexp(np.rint(math.ldexp(mantissa, bits)), exponent - bits))


@parallel(FASTMATH)
def descend_block(
    low: int,
    high: int,
    codes: NDArray[np.uint8],
    scale: NDArray[np.float32],
    middle: NDArray[np.float32],
    gradient: NDArray[np.float32],
    gram: NDArray[np.float32],
    levels: int,
    error: NDArray[np.float32],
) -> None:
    """One sweep over one block of columns, whole groups: every code moves to its best value given all others, then
    the group's scale does. Rows are independent and run in parallel.

    codes: [out, columns] and scale: [out, groups], updated. middle: [out, groups]. gradient: [out, columns], (q - w) H.
    gram: [columns, columns]. error: [out, columns], q - w, updated. A scale moves only when that lowers the loss, and
    at most to half or twice itself.
    """
    rows, columns = gradient.shape
    groups = scale.shape[1]
    size = columns // groups
    top = np.float32(levels - 1)
    for band in range(low, high):
        top_row, end_row = band * LANES, min((band + 1) * LANES, rows)
        count = end_row - top_row
        # of each column: its slope before its group moved, what it moved by, its level above the zero
        slopes, moved = np.empty((columns, LANES), np.float32), np.empty((columns, LANES), np.float32)
        level, code = np.empty((size, LANES), np.float32), np.empty((columns, LANES), np.float32)
        step, zero, pulled = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        slope, curve = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        _turn(gradient[top_row:end_row], slopes)
        _turn(codes[top_row:end_row], code)
        for g in range(groups):
            first, end = g * size, (g + 1) * size
            for i in range(count):
                step[i], zero[i] = scale[top_row + i, g], middle[top_row + i, g]
            for j in range(first, end):
                before, pull = slopes[j], gram[j]
                add_products(pull[:first], moved[:first], before)
                _copy(before, pulled)
                add_products(pull[first:j], moved[first:j], pulled)
                softness = np.float32(1.0) / pull[j]
                chosen, own, height = code[j], moved[j], level[j - first]
                for i in range(count):
                    old = chosen[i]
                    new = np.rint(old - pulled[i] * softness / step[i])
                    new = min(max(new, np.float32(0.0)), top)
                    chosen[i] = new
                    own[i] = (new - old) * step[i]
                    height[i] = new - zero[i]
            _fill(slope, 0.0)
            _fill(curve, 0.0)
            for j in range(first, end):
                _fill(pulled, 0.0)  # H c of the group
                add_products(gram[j, first:end], level, pulled)
                before, own, height = slopes[j], moved[j], level[j - first]
                for i in range(count):
                    slope[i] += height[i] * before[i] + own[i] * pulled[i]
                    curve[i] += height[i] * pulled[i]
            for i in range(count):
                change = np.float32(0.0)
                if curve[i] > 0:
                    wanted = step[i] - slope[i] / curve[i]
                    if 0.5 < wanted / step[i] < 2.0:
                        change = _as_float16(wanted) - step[i]
                        if change * (2 * slope[i] + change * curve[i]) >= 0:
                            change = np.float32(0.0)
                scale[top_row + i, g] = step[i] + change
                pulled[i] = change
            for j in range(first, end):
                own, height = moved[j], level[j - first]
                for i in range(count):
                    own[i] += pulled[i] * height[i]
        for i in range(count):
            own_code, own_error = codes[top_row + i], error[top_row + i]
            for j in range(columns):
                own_code[j] = np.uint8(code[j, i])
                own_error[j] += moved[j, i]


@njit(inline="always")  # type: ignore[untyped-decorator]
def _neighbour(around: int, turn: int, shares: int) -> int:
    """The candidates next to one in turn: 1 before, 1 behind, 2 before and so on, but never of the other sign."""
    lowest = around // shares * shares
    at = around + (turn // 2 + 1) * (1 if turn % 2 else -1)
    return min(max(at, lowest), lowest + shares - 1)


@njit(inline="always")  # type: ignore[untyped-decorator]
def _loss_by_columns(
    weight: NDArray[np.float32],
    importance: NDArray[np.float32],
    step: np.float32,
    zero: np.float32,
    top: np.float32,
    losses: NDArray[np.float32],
) -> np.float32:
    """What rounding a group [group_size] to nearest loses. losses: [group_size], overwritten."""
    for j in range(weight.size):
        code = np.rint(weight[j] / step + zero)
        code = min(max(code, np.float32(0.0)), top)
        error = (code - zero) * step - weight[j]
        losses[j] = importance[j] * error * error
    return lane_sum(losses)


@parallel(FASTMATH)
def best_range(
    low: int,
    high: int,
    weight: NDArray[np.float32],
    importance: NDArray[np.float32],
    scale: NDArray[np.float32],
    middle: NDArray[np.uint8],
    levels: int,
    shares: int,
    coarse: int,
    best: NDArray[np.int64],
) -> None:
    """For each group the candidate grid that loses least when its weights are rounded to nearest.

    weight: [out, groups, group_size]. importance: [groups, group_size]. scale, middle: [candidates, out, groups], so
    many `shares` in a row neighbours of each other; every `coarse`-th of them is tried, then what lies around the best.
    best: [out, groups] receives the candidate's index, the first of equals.
    """
    rows, groups, size = weight.shape
    top = np.float32(levels - 1)
    for i in range(low, high):
        losses = np.empty(size, np.float32)
        for g in range(groups):
            least = np.float32(np.inf)
            values, columns = weight[i, g], importance[g]
            around = 0
            for at in range(scale.shape[0]):
                if at % shares % coarse:
                    continue
                loss = _loss_by_columns(values, columns, scale[at, i, g], np.float32(middle[at, i, g]), top, losses)
                if loss < least:
                    least, around = loss, at
            best[i, g] = around
            for turn in range(2 * (coarse - 1)):
                at = _neighbour(around, turn, shares)
                loss = _loss_by_columns(values, columns, scale[at, i, g], np.float32(middle[at, i, g]), top, losses)
                if loss < least:
                    least = loss
                    best[i, g] = at


@parallel(FASTMATH)
def best_range_by_blocks(
    low: int,
    high: int,
    weight: NDArray[np.float32],
    upper: NDArray[np.float32],
    scale: NDArray[np.float32],
    middle: NDArray[np.uint8],
    levels: int,
    shares: int,
    coarse: int,
    best: NDArray[np.int64],
) -> None:
    """The same by `error H_gg error^T`, H_gg being a group's own block of the Gram matrix.

    upper: [groups, group_size, group_size], the blocks as `maths/affine.upper_bands` folds them over STRIP columns.
    Weights are turned so that the vectors run over rows: one number of the Gram matrix then serves all of them.
    """
    rows, groups, size = weight.shape
    top = np.float32(levels - 1)
    whole = (shares + coarse - 1) // coarse  # of each sign
    first_turn = scale.shape[0] // shares * whole
    for band in range(low, high):
        first = band * LANES
        turned, error = np.empty((size, LANES), np.float32), np.empty((size, LANES), np.float32)
        step, zero, pulled = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        loss, least = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        at, around = np.empty(LANES, np.int64), np.zeros(LANES, np.int64)
        for g in range(groups):
            for i in range(LANES):  # behind the last row it is taken again
                row = weight[min(first + i, rows - 1), g]
                for j in range(size):
                    turned[j, i] = row[j]
            _fill(least, np.inf)
            for turn in range(first_turn + 2 * (coarse - 1)):
                if turn == first_turn:
                    for i in range(LANES):
                        around[i] = best[min(first + i, rows - 1), g]
                for i in range(LANES):
                    row_at = min(first + i, rows - 1)
                    if turn < first_turn:
                        at[i] = turn // whole * shares + turn % whole * coarse
                    else:
                        at[i] = _neighbour(around[i], turn - first_turn, shares)
                    step[i], zero[i] = scale[at[i], row_at, g], np.float32(middle[at[i], row_at, g])
                for j in range(size):
                    values, off = turned[j], error[j]
                    for i in range(LANES):
                        code = np.rint(values[i] / step[i] + zero[i])
                        code = min(max(code, np.float32(0.0)), top)
                        off[i] = (code - zero[i]) * step[i] - values[i]
                _fill(loss, 0.0)
                for j in range(size):
                    _fill(pulled, 0.0)
                    start = j - j % STRIP
                    add_products(upper[g, j, start:], error[start:], pulled)
                    own = error[j]
                    for i in range(LANES):
                        loss[i] += own[i] * pulled[i]
                for i in range(min(LANES, rows - first)):
                    if loss[i] < least[i]:
                        least[i] = loss[i]
                        best[first + i, g] = at[i]
