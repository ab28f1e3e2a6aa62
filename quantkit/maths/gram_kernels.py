"""Compiled loops over the inputs of linears, for Gram matrices from 8-bit integers.

Inputs are float32, or the bits of bfloat16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange  # type: ignore[import-untyped]
from numpy.typing import NDArray

from quantkit.maths.float_bits import value_of


@njit(parallel=True, cache=True, fastmath={"contract", "nsz"})  # type: ignore[untyped-decorator]
def column_sums(rows: NDArray[Any], far: NDArray[np.bool_], band: int, parts: NDArray[np.float32]) -> None:
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
                size = abs(value_of(row[j]))
                sums[j] += size
                squares[j] += size * size
                largest[j] = max(largest[j], size)


@njit(parallel=True, cache=True, fastmath={"contract", "nsz"})  # type: ignore[untyped-decorator]
def round_rows(
    rows: NDArray[Any],
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
            beyond += abs(value_of(row[j])) > reach[j]
        far[i] = beyond > 0
        if beyond:
            code[:] = 0
        else:
            for j in range(columns):
                code[j] = np.int8(np.rint(value_of(row[j]) * inverse[j]))


@njit(parallel=True, cache=True, fastmath={"contract", "nsz"})  # type: ignore[untyped-decorator]
def add_scaled(
    product: NDArray[np.int32], across: NDArray[np.float32], along: NDArray[np.float32], gram: NDArray[np.float32]
) -> None:
    """gram += across[:, None] * product * along: all [rows, columns]."""
    rows, columns = product.shape
    for i in prange(rows):
        found, own, factor = product[i], gram[i], across[i]
        for j in range(columns):
            own[j] += np.float32(found[j]) * factor * along[j]
