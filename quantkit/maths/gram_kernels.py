"""Compiled loops over the inputs of linears, for Gram matrices from 8-bit integers.

Inputs are float32, or the bits of bfloat16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit  # type: ignore[import-untyped]
from numpy.typing import NDArray

from quantkit.maths.float_bits import value_of
from quantkit.maths.parallel import FASTMATH, parallel


@parallel(FASTMATH)
def column_sums(
    low: int,
    high: int,
    rows: NDArray[Any],
    far: NDArray[np.bool_],
    band: int,
    which: NDArray[np.int64],
    parts: NDArray[np.float32],
) -> None:
    """Sum of |x|, sum of x^2 and largest |x| of each column over the rows [tokens, columns] that are not far.

    far: [tokens]. which: the bands, of so many rows each, that are looked at. parts: [bands, 3, columns] receives their
    sums, whatever the threads. A NaN stays one.
    """
    tokens, columns = rows.shape
    for at in range(low, high):
        part = which[at]
        sums, squares, largest = parts[part, 0], parts[part, 1], parts[part, 2]
        sums[:] = 0.0
        squares[:] = 0.0
        largest[:] = 0.0
        near, count = np.empty(band, np.int64), 0
        for i in range(part * band, min((part + 1) * band, tokens)):
            if not far[i]:
                near[count] = i
                count += 1
        whole = count - count % 4
        for k in range(0, whole, 4):  # four at a time, so that the sums are loaded and stored once for them
            a, b, c, d = rows[near[k]], rows[near[k + 1]], rows[near[k + 2]], rows[near[k + 3]]
            for j in range(columns):
                p, q, r, s = abs(value_of(a[j])), abs(value_of(b[j])), abs(value_of(c[j])), abs(value_of(d[j]))
                sums[j] += (p + q) + (r + s)
                squares[j] += (p * p + q * q) + (r * r + s * s)
                largest[j] = max(largest[j], max(max(p, q), max(r, s)))
        for k in range(whole, count):
            row = rows[near[k]]
            for j in range(columns):
                size = abs(value_of(row[j]))
                sums[j] += size
                squares[j] += size * size
                largest[j] = max(largest[j], size)


@njit(cache=True, fastmath={"contract", "nsz"})  # type: ignore[untyped-decorator]
def add_bands(parts: NDArray[np.float32], totals: NDArray[np.float32]) -> None:
    """Add what `column_sums` found in its bands to totals [3, columns]: two sums, in which a NaN stays one, and the
    largest."""
    bands, _, columns = parts.shape
    sums, squares, largest = totals[0], totals[1], totals[2]
    for band in range(bands):
        part = parts[band]
        for j in range(columns):
            sums[j] += part[0, j]
            squares[j] += part[1, j]
            largest[j] = max(largest[j], part[2, j])


@njit(cache=True, fastmath={"contract", "nsz"})  # type: ignore[untyped-decorator]
def bands_beyond(parts: NDArray[np.float32], reach: NDArray[np.float32]) -> NDArray[np.int64]:
    """The bands with an |x| beyond `reach` [columns]."""
    bands, _, columns = parts.shape
    found, count = np.empty(bands, np.int64), 0
    for band in range(bands):
        largest, beyond = parts[band, 2], 0
        for j in range(columns):
            beyond += largest[j] > reach[j]
        if beyond:
            found[count] = band
            count += 1
    return found[:count]


@parallel(FASTMATH)
def mark_far(
    low: int,
    high: int,
    rows: NDArray[Any],
    reach: NDArray[np.float32],
    band: int,
    which: NDArray[np.int64],
    far: NDArray[np.bool_],
) -> None:
    """Set far [tokens] for rows [tokens, columns] with an |x| beyond `reach` [columns], in the bands `which`."""
    tokens, columns = rows.shape
    for at in range(low, high):
        for i in range(which[at] * band, min((which[at] + 1) * band, tokens)):
            row, beyond = rows[i], int(far[i])
            for j in range(columns):
                beyond += abs(value_of(row[j])) > reach[j]
            far[i] = beyond > 0


@parallel(FASTMATH)
def round_rows(
    low: int,
    high: int,
    rows: NDArray[Any],
    inverse: NDArray[np.float32],
    far: NDArray[np.bool_],
    codes: NDArray[np.int8],
) -> None:
    """8-bit codes `round(x * inverse)` [tokens, columns]; those of rows that are far [tokens] are 0."""
    tokens, columns = rows.shape
    for i in range(low, high):
        row, code = rows[i], codes[i]
        if far[i]:
            code[:] = 0
        else:
            for j in range(columns):
                code[j] = np.int8(np.rint(value_of(row[j]) * inverse[j]))


@parallel(FASTMATH)
def add_scaled(
    low: int,
    high: int,
    product: NDArray[np.int32],
    across: NDArray[np.float32],
    along: NDArray[np.float32],
    gram: NDArray[np.float32],
    fresh: bool,
) -> None:
    """gram += across[:, None] * product * along: all [rows, columns]. fresh: gram holds nothing yet."""
    rows, columns = product.shape
    for i in range(low, high):
        found, own, factor = product[i], gram[i], across[i]
        if fresh:
            own[:] = 0.0
        for j in range(columns):
            own[j] += np.float32(found[j]) * factor * along[j]
