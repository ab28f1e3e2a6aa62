"""Compiled loops for the CPU, where a column of a block depends on the one before and no tensor operation helps.

Inner loops run over slices from 0: numba lets an index that might be negative count from the end, and a loop with such
an index is not vectorized (three times slower here).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, prange  # type: ignore[import-untyped]
from numpy.typing import NDArray

from quantkit.maths.lane_sum import lane_sum

STRIP = 16
"""Rows that are multiplied and added up together: their sum is then loaded and stored once."""

LANES = 64
"""Rows of a weight that go through a block together, as lanes of the vectors: a column waits for the one before it, and
one number of a matrix serves all rows. A few vectors wide, and a block of columns stays near the first-level cache."""


@njit(inline="always")  # type: ignore[untyped-decorator]
def _add_products(factors: NDArray[np.float32], lanes: NDArray[np.float32], sums: NDArray[np.float32]) -> None:
    """sums [LANES] += factors [columns] @ lanes [columns, LANES], in the same order for every lane.

    The number of lanes is a constant, which makes the loop twice as fast; some may hold nothing of worth.
    """
    columns = factors.size
    whole = columns - columns % STRIP
    for start in range(0, whole, STRIP):
        f, x = factors[start : start + STRIP], lanes[start : start + STRIP]
        f0, f1, f2, f3, f4, f5, f6, f7 = f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7]
        f8, f9, fa, fb, fc, fd, fe, ff = f[8], f[9], f[10], f[11], f[12], f[13], f[14], f[15]
        for i in range(LANES):
            sums[i] += (
                (f0 * x[0, i] + f1 * x[1, i] + f2 * x[2, i] + f3 * x[3, i])
                + (f4 * x[4, i] + f5 * x[5, i] + f6 * x[6, i] + f7 * x[7, i])
            ) + (
                (f8 * x[8, i] + f9 * x[9, i] + fa * x[10, i] + fb * x[11, i])
                + (fc * x[12, i] + fd * x[13, i] + fe * x[14, i] + ff * x[15, i])
            )
    for k in range(whole, columns):
        factor, row = factors[k], lanes[k]
        for i in range(LANES):
            sums[i] += factor * row[i]


@njit  # type: ignore[untyped-decorator]
def _turn(rows: NDArray[Any], lanes: NDArray[np.float32]) -> None:
    """rows [n, columns] into lanes [columns, at least n]."""
    for i in range(rows.shape[0]):
        row = rows[i]
        for j in range(row.size):
            lanes[j, i] = row[j]


@njit(parallel=True, cache=True, fastmath={"contract", "nsz"}, error_model="numpy")  # type: ignore[untyped-decorator]
def round_block(
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
    for band in prange((rows + LANES - 1) // LANES):
        first, end = band * LANES, min((band + 1) * LANES, rows)
        values, error = np.empty((columns, LANES), np.float32), np.empty((columns, LANES), np.float32)
        code, pulls = np.empty((columns, LANES), np.uint8), np.empty((columns, LANES), np.float32)
        _turn(weight[first:end], values)
        _turn(owed[first:end], pulls)
        for j in range(columns):
            pulled = pulls[j]
            _add_products(lower[j, :j], error[:j], pulled)
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


@njit(parallel=True, cache=True, fastmath={"contract", "nsz"}, error_model="numpy")  # type: ignore[untyped-decorator]
def descend_block(
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
    for band in prange((rows + LANES - 1) // LANES):
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
                _add_products(pull[:first], moved[:first], before)
                pulled[:] = before
                _add_products(pull[first:j], moved[first:j], pulled)
                softness = np.float32(1.0) / pull[j]
                chosen, own, height = code[j], moved[j], level[j - first]
                for i in range(count):
                    old = chosen[i]
                    new = np.rint(old - pulled[i] * softness / step[i])
                    new = min(max(new, np.float32(0.0)), top)
                    chosen[i] = new
                    own[i] = (new - old) * step[i]
                    height[i] = new - zero[i]
            slope[:] = 0.0
            curve[:] = 0.0
            for j in range(first, end):
                pulled[:] = 0.0  # H c of the group
                _add_products(gram[j, first:end], level, pulled)
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


@njit(parallel=True, cache=True, fastmath={"contract", "nsz"})  # type: ignore[untyped-decorator]
def best_range(
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
    for i in prange(rows):
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


@njit(parallel=True, cache=True, fastmath={"contract", "nsz"}, error_model="numpy")  # type: ignore[untyped-decorator]
def best_range_by_blocks(
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
    for band in prange((rows + LANES - 1) // LANES):
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
            least[:] = np.inf
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
                loss[:] = 0.0
                for j in range(size):
                    pulled[:] = 0.0
                    start = j - j % STRIP
                    _add_products(upper[g, j, start:], error[start:], pulled)
                    own = error[j]
                    for i in range(LANES):
                        loss[i] += own[i] * pulled[i]
                for i in range(min(LANES, rows - first)):
                    if loss[i] < least[i]:
                        least[i] = loss[i]
                        best[first + i, g] = at[i]
