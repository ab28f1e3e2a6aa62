"""Compiled loops for the CPU, where a column of a block depends on the one before and no tensor operation helps.

Inner loops run over slices from 0: numba lets an index that might be negative count from the end, and a loop with such
an index is not vectorized (three times slower here).
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange  # type: ignore[import-untyped]
from numpy.typing import NDArray

BAND = 4
"""Rows that go through a block together: a column waits for the one before it, so that the processor has only other
rows to work on meanwhile."""

STRIP = 16
"""Rows of a Gram block that are multiplied together where ranges are scored: what they add up to is loaded and stored
once."""

LANES = 64
"""Rows of a weight whose group is scored together: a few vectors wide, and with all columns of a usual group within the
first-level cache."""


@njit(parallel=True, cache=True, fastmath={"contract", "nsz"})  # type: ignore[untyped-decorator]
def round_block(
    work: NDArray[np.float32],
    scale: NDArray[np.float32],
    middle: NDArray[np.float32],
    group: NDArray[np.int64],
    upper: NDArray[np.float32],
    levels: int,
    codes: NDArray[np.uint8],
    errors: NDArray[np.float32],
) -> None:
    """GPTQ's inner loop over one block of columns; rows are independent and run in parallel.

    work: [out, columns], overwritten. scale, middle: [out, groups]; group: [columns], the group of each column. upper:
    [columns, columns]. codes and errors [out, columns] receive the result. Sums run in one fixed order a row, so the
    result does not depend on the threads.
    """
    rows, columns = work.shape
    top = np.float32(levels - 1)
    for band in prange((rows + BAND - 1) // BAND):
        first, end = band * BAND, min((band + 1) * BAND, rows)
        for j in range(columns):
            g = group[j]
            inverse = np.float32(1.0) / upper[j, j]
            for i in range(first, end):
                value = work[i, j]
                step, zero = scale[i, g], middle[i, g]
                code = np.rint(value / step + zero)
                code = min(max(code, np.float32(0.0)), top)
                error = (value - (code - zero) * step) * inverse
                codes[i, j] = np.uint8(code)
                errors[i, j] = error
                rest, pull = work[i, j + 1 :], upper[j, j + 1 :]
                for k in range(rest.size):
                    rest[k] -= error * pull[k]


@njit(inline="always")  # type: ignore[untyped-decorator]
def _as_float16(value: float) -> np.float32:
    """A positive number rounded to the 11 significant bits of float16, half to even; subnormals on their own grid."""
    mantissa, exponent = math.frexp(value)
    bits = 11 if exponent >= -13 else 24 + exponent
    return np.float32(math.ldexp(np.rint(math.ldexp(mantissa, bits)), exponent - bits))


@njit(parallel=True, cache=True, fastmath={"contract", "nsz"})  # type: ignore[untyped-decorator]
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

    codes: [out, columns] and scale: [out, groups], updated. middle: [out, groups]. gradient: [out, columns], (q - w) H,
    overwritten. gram: [columns, columns]. error: [out, columns], q - w, updated. A scale moves only when that lowers
    the loss, and at most to half or twice itself.
    """
    rows, columns = gradient.shape
    groups = scale.shape[1]
    size = columns // groups
    top = np.float32(levels - 1)
    softness = np.empty(columns, np.float32)
    for j in range(columns):
        softness[j] = np.float32(1.0) / gram[j, j]
    for band in prange((rows + BAND - 1) // BAND):
        top_row, end_row = band * BAND, min((band + 1) * BAND, rows)
        turned = np.empty((BAND, size), np.float32)
        for g in range(groups):
            first, end = g * size, (g + 1) * size
            for j in range(first, end):
                for i in range(top_row, end_row):
                    step = scale[i, g]
                    old = np.float32(codes[i, j])
                    code = np.rint(old - gradient[i, j] * softness[j] / step)
                    code = min(max(code, np.float32(0.0)), top)
                    if code != old:
                        moved = (code - old) * step
                        codes[i, j] = np.uint8(code)
                        error[i, j] += moved
                        slopes, pull = gradient[i, first:], gram[j, first:]
                        for k in range(slopes.size):
                            slopes[k] += moved * pull[k]
            turned[:] = 0.0  # H c of the group: a column at a time, since sums across lanes would not be in order
            for j in range(first, end):
                pull = gram[j, first:end]
                for i in range(top_row, end_row):
                    level = np.float32(codes[i, j]) - middle[i, g]
                    own = turned[i - top_row]
                    for k in range(pull.size):
                        own[k] += level * pull[k]
            for i in range(top_row, end_row):
                step, zero = scale[i, g], middle[i, g]
                slope = np.float32(0.0)
                curve = np.float32(0.0)
                for j in range(first, end):
                    level = np.float32(codes[i, j]) - zero
                    slope += level * gradient[i, j]
                    curve += level * turned[i - top_row, j - first]
                if curve <= 0:
                    continue
                wanted = step - slope / curve
                if not (0.5 < wanted / step < 2.0):
                    continue
                moved = _as_float16(wanted) - step
                if moved * (2 * slope + moved * curve) >= 0:
                    continue
                scale[i, g] = step + moved
                for j in range(first, end):
                    change = moved * (np.float32(codes[i, j]) - zero)
                    error[i, j] += change
                    if change != 0:
                        slopes, pull = gradient[i, end:], gram[j, end:]
                        for k in range(slopes.size):
                            slopes[k] += change * pull[k]


@njit(parallel=True, cache=True, fastmath={"contract", "nsz", "reassoc"})  # type: ignore[untyped-decorator]
def best_range(
    weight: NDArray[np.float32],
    importance: NDArray[np.float32],
    scale: NDArray[np.float32],
    middle: NDArray[np.float32],
    levels: int,
    best: NDArray[np.int64],
) -> None:
    """For each group the candidate grid that loses least when its weights are rounded to nearest.

    weight: [out, groups, group_size]. importance: [groups, group_size]. scale, middle: [candidates, out, groups].
    best: [out, groups] receives the candidate's index, the first of equals.
    """
    rows, groups, size = weight.shape
    top = np.float32(levels - 1)
    for i in prange(rows):
        for g in range(groups):
            least = np.float32(np.inf)
            for candidate in range(scale.shape[0]):
                step, zero = scale[candidate, i, g], middle[candidate, i, g]
                loss = np.float32(0.0)
                for j in range(size):
                    code = np.rint(weight[i, g, j] / step + zero)
                    code = min(max(code, np.float32(0.0)), top)
                    error = (code - zero) * step - weight[i, g, j]
                    loss += importance[g, j] * error * error
                if loss < least:
                    least = loss
                    best[i, g] = candidate


@njit(parallel=True, cache=True, fastmath={"contract", "nsz", "reassoc"}, error_model="numpy")  # type: ignore[untyped-decorator]
def best_range_by_blocks(
    weight: NDArray[np.float32],
    upper: NDArray[np.float32],
    scale: NDArray[np.float32],
    middle: NDArray[np.float32],
    levels: int,
    best: NDArray[np.int64],
) -> None:
    """The same by `error H_gg error^T`, H_gg being a group's own block of the Gram matrix.

    upper: [groups, group_size, group_size], the blocks as `maths/affine.upper_bands` folds them over STRIP columns.
    Weights are turned so that the vectors run over rows: one number of the Gram matrix then serves all of them.
    """
    rows, groups, size = weight.shape
    top = np.float32(levels - 1)
    whole = size - size % STRIP
    for band in prange((rows + LANES - 1) // LANES):
        first = band * LANES
        turned, error = np.empty((size, LANES), np.float32), np.empty((size, LANES), np.float32)
        step, zero, pulled = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        loss, least = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        for g in range(groups):
            for i in range(LANES):  # behind the last row it is taken again
                row = weight[min(first + i, rows - 1), g]
                for j in range(size):
                    turned[j, i] = row[j]
            least[:] = np.inf
            for candidate in range(scale.shape[0]):
                for i in range(LANES):
                    at = min(first + i, rows - 1)
                    step[i], zero[i] = scale[candidate, at, g], middle[candidate, at, g]
                for j in range(size):
                    values, off = turned[j], error[j]
                    for i in range(LANES):
                        code = np.rint(values[i] / step[i] + zero[i])
                        code = min(max(code, np.float32(0.0)), top)
                        off[i] = (code - zero[i]) * step[i] - values[i]
                loss[:] = 0.0
                for j in range(size):
                    pull = upper[g, j]
                    pulled[:] = 0.0
                    for start in range(j - j % STRIP, whole, STRIP):
                        p, e = pull[start : start + STRIP], error[start : start + STRIP]
                        p0, p1, p2, p3, p4, p5, p6, p7 = p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]
                        p8, p9, pa, pb, pc, pd, pe, pf = p[8], p[9], p[10], p[11], p[12], p[13], p[14], p[15]
                        for i in range(LANES):
                            pulled[i] += (
                                (p0 * e[0, i] + p1 * e[1, i] + p2 * e[2, i] + p3 * e[3, i])
                                + (p4 * e[4, i] + p5 * e[5, i] + p6 * e[6, i] + p7 * e[7, i])
                            ) + (
                                (p8 * e[8, i] + p9 * e[9, i] + pa * e[10, i] + pb * e[11, i])
                                + (pc * e[12, i] + pd * e[13, i] + pe * e[14, i] + pf * e[15, i])
                            )
                    for k in range(max(whole, j - j % STRIP), size):
                        one, other = pull[k], error[k]
                        for i in range(LANES):
                            pulled[i] += one * other[i]
                    own = error[j]
                    for i in range(LANES):
                        loss[i] += own[i] * pulled[i]
                for i in range(min(LANES, rows - first)):
                    if loss[i] < least[i]:
                        least[i] = loss[i]
                        best[first + i, g] = candidate


@njit(parallel=True, cache=True, fastmath={"contract", "nsz"})  # type: ignore[untyped-decorator]
def column_sums(rows: NDArray[np.float32], far: NDArray[np.bool_], band: int, parts: NDArray[np.float32]) -> None:
    """Sum of |x|, sum of x^2 and largest |x| of each column over the rows [tokens, columns] that are not far.

    far: [tokens]. parts: [bands, 3, columns] receives the sums of so many rows each, whatever the threads. A NaN stays
    one.
    """
    tokens, columns = rows.shape
    for part in prange(parts.shape[0]):
        sums, squares, largest = parts[part, 0], parts[part, 1], parts[part, 2]
        sums[:] = 0.0
        squares[:] = 0.0
        largest[:] = 0.0
        for i in range(part * band, min((part + 1) * band, tokens)):
            if far[i]:
                continue
            row = rows[i]
            for j in range(columns):
                size = abs(row[j])
                sums[j] += size
                squares[j] += size * size
                largest[j] = max(largest[j], size)


@njit(parallel=True, cache=True, fastmath={"contract", "nsz"})  # type: ignore[untyped-decorator]
def round_rows(
    rows: NDArray[np.float32],
    reach: NDArray[np.float32],
    inverse: NDArray[np.float32],
    codes: NDArray[np.int8],
    far: NDArray[np.bool_],
) -> None:
    """8-bit codes `round(x * inverse)` [tokens, columns] of rows whose every |x| is within `reach` of its column.

    far: [tokens], true for rows that are known to be far and set for those that have a value beyond; their codes are 0.
    """
    tokens, columns = rows.shape
    for i in prange(tokens):
        row, code = rows[i], codes[i]
        beyond = int(far[i])
        for j in range(columns):
            beyond += abs(row[j]) > reach[j]
        far[i] = beyond > 0
        if beyond:
            code[:] = 0
        else:
            for j in range(columns):
                code[j] = np.int8(np.rint(row[j] * inverse[j]))
