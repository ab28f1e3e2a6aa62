"""Compiled loops that choose codes, scales and minima on the grids of ggml's blocks by the Gram matrix of the inputs.

The same two steps as in maths/kernels.py, for grids whose numbers are themselves quantized and whose levels may be
uneven. Rows are independent and run in parallel; sums run in one fixed order, whatever the threads.
"""

from __future__ import annotations

from collections.abc import Sized

import numpy as np
from numba import njit  # type: ignore[import-untyped]
from numpy.typing import NDArray

from quantkit.maths.ggml_bits import half_bits, half_value
from quantkit.maths.parallel import FASTMATH, parallel

BAND = 4
"""Rows that go through a block together: a column waits for the one before it, so that the processor has only other
rows to work on meanwhile."""


def bands_of(rows: Sized) -> int:
    """How many steps so many rows are."""
    return -(-len(rows) // BAND)


@njit(forceinline=True, error_model="numpy", fastmath={"contract", "nsz"})  # type: ignore[untyped-decorator]
def _nearest_code(value: np.float32, table: NDArray[np.float32], uniform: bool) -> int:
    """The code whose value is nearest; of evenly spaced ones by rounding half to even, as GPTQ's kernel does."""
    if uniform:
        code = np.rint(value - table[0])
        return int(min(max(code, np.float32(0.0)), np.float32(table.size - 1)))
    found = 0
    for i in range(table.size - 1):
        found += 1 if value >= np.float32(0.5) * (table[i] + table[i + 1]) else 0
    return found


@parallel(FASTMATH)
def round_block(
    low: int,
    high: int,
    weight: NDArray[np.float32],
    owed: NDArray[np.float32],
    step: NDArray[np.float32],
    table: NDArray[np.float32],
    uniform: bool,
    group: NDArray[np.int64],
    upper: NDArray[np.float32],
    codes: NDArray[np.uint8],
    errors: NDArray[np.float32],
) -> None:
    """GPTQ's inner loop over one block of columns: every weight goes to the nearest `step * table[code]`.

    weight: [out, columns]. owed: [out, columns], what the errors of blocks before this one add to those of its columns
    by the factor; overwritten. step: [out, groups], none zero; group: [columns], the group of each column. table:
    [levels], rising. upper: [columns, columns]. codes and errors [out, columns] receive the result, errors the weight
    less what its codes stand for.
    """
    rows, columns = weight.shape
    for band in range(low, high):
        first, end = band * BAND, min((band + 1) * BAND, rows)
        for j in range(columns):
            g = group[j]
            inverse = np.float32(1.0) / upper[j, j]
            for i in range(first, end):
                value, own = weight[i, j], step[i, g]
                code = _nearest_code((value + owed[i, j] * inverse) / own, table, uniform)
                error = value - table[code] * own
                codes[i, j] = np.uint8(code)
                errors[i, j] = error
                rest, pull = owed[i, j + 1 :], upper[j, j + 1 :]
                for k in range(rest.size):
                    rest[k] += error * pull[k]


@njit(forceinline=True, error_model="numpy", fastmath={"contract", "nsz"})  # type: ignore[untyped-decorator]
def _stored(value: np.float32, unit: np.float32, least: int, most: int) -> np.float32:
    """The nearest number that can be stored: a level least ... most of a unit, or with most = 0 a float16."""
    if most == 0:
        return half_value(half_bits(value))
    level = min(max(np.rint(value / unit), np.float32(least)), np.float32(most))
    return np.float32(level * unit)


@parallel(FASTMATH)
def descend_block(
    low: int,
    high: int,
    codes: NDArray[np.uint8],
    step: NDArray[np.float32],
    base: NDArray[np.float32],
    units: NDArray[np.float32],
    levels: NDArray[np.int64],
    affine: bool,
    table: NDArray[np.float32],
    uniform: bool,
    gradient: NDArray[np.float32],
    gram: NDArray[np.float32],
    error: NDArray[np.float32],
) -> None:
    """One sweep over one block of columns, whole groups: every code moves to its best value given all others, then the
    group's scale and minimum move together.

    codes: [out, columns]; step, base: [out, groups], all updated: w = step * table[code] - base. units: [2, out,
    groups], of scale and minimum. levels: [2], least and largest level of a scale, those of a minimum are 0 and the
    same largest; zeros where both are float16 numbers. affine: whether there are minima. gradient: [out, columns],
    (q - w) H, overwritten. gram: [columns, columns]. error: [out, columns], q - w, updated. A group whose step is 0
    stays.
    """
    rows, columns = gradient.shape
    groups = step.shape[1]
    size = columns // groups
    zero, one, two = np.float32(0.0), np.float32(1.0), np.float32(2.0)
    least, most = levels[0], levels[1]
    sums = np.zeros(columns, np.float32)  # H 1 of each group
    flat = np.zeros(groups, np.float32)  # 1 H 1
    for g in range(groups):
        for j in range(g * size, (g + 1) * size):
            for k in range(g * size, (g + 1) * size):
                sums[k] += gram[j, k]
        for k in range(g * size, (g + 1) * size):
            flat[g] += sums[k]
    for band in range(low, high):
        top_row, end_row = band * BAND, min((band + 1) * BAND, rows)
        turned = np.empty((BAND, size), np.float32)
        for g in range(groups):
            first, end = g * size, (g + 1) * size
            for j in range(first, end):
                softness = one / gram[j, j]
                for i in range(top_row, end_row):
                    own, old = step[i, g], codes[i, j]
                    if own == zero:
                        continue
                    code = _nearest_code(table[old] - gradient[i, j] * softness / own, table, uniform)
                    if code != old:
                        moved = (table[code] - table[old]) * own
                        codes[i, j] = np.uint8(code)
                        error[i, j] += moved
                        slopes, pull = gradient[i, first:], gram[j, first:]
                        for k in range(slopes.size):
                            slopes[k] += moved * pull[k]
            turned[:] = zero  # H c of the group: a column at a time, since sums across lanes would not be in order
            for j in range(first, end):
                pull = gram[j, first:end]
                for i in range(top_row, end_row):
                    level, to = table[codes[i, j]], turned[i - top_row]
                    for k in range(pull.size):
                        to[k] += level * pull[k]
            for i in range(top_row, end_row):
                own, floor = step[i, g], base[i, g]
                if own == zero:
                    continue
                # loss change of a scale ds larger and a minimum db larger:
                # 2 (slope ds + fall db) + curve ds^2 + 2 mixed ds db + flat db^2
                slope, fall, curve, mixed = zero, zero, zero, zero
                for j in range(first, end):
                    level = table[codes[i, j]]
                    slope += level * gradient[i, j]
                    fall -= gradient[i, j]
                    curve += level * turned[i - top_row, j - first]
                    mixed -= level * sums[j]
                if curve <= zero:
                    continue
                moves_base = affine and flat[g] > zero and not (most > 0 and units[1, i, g] == zero)
                wanted = -slope / curve
                if moves_base:
                    determinant = curve * flat[g] - mixed * mixed
                    if determinant > np.float32(1e-6) * curve * flat[g]:
                        wanted = (fall * mixed - slope * flat[g]) / determinant
                new = _stored(own + wanted, units[0, i, g], least, most)
                if not (np.float32(0.5) < new / own < two):
                    new = own
                more, new_floor = new - own, floor
                if moves_base:
                    new_floor = _stored(floor - (fall + mixed * more) / flat[g], units[1, i, g], 0, most)
                lower = new_floor - floor
                change = two * (slope * more + fall * lower) + curve * more * more
                change += two * mixed * more * lower + flat[g] * lower * lower
                if not change < zero:
                    continue
                step[i, g], base[i, g] = new, new_floor
                for j in range(first, end):
                    moved = more * table[codes[i, j]] - lower
                    error[i, j] += moved
                    if moved != zero:
                        slopes, pull = gradient[i, end:], gram[j, end:]
                        for k in range(slopes.size):
                            slopes[k] += moved * pull[k]
