"""Compiled loops that bring columns and rows of a matrix into another order; PyTorch does one number at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.maths.parallel import long_and_short, parallel
from quantkit.maths.vectors import SQUARE, turn_square


@parallel()
def pick(
    low: int, high: int, matrix: NDArray[Any], rows: NDArray[Any], columns: NDArray[Any], out: NDArray[Any]
) -> None:
    """out[i, j] = matrix[rows[i], columns[j]]."""
    for i in range(low, high):
        found, own = matrix[rows[i]], out[i]
        for j in range(columns.size):
            own[j] = found[columns[j]]


@parallel()
def pick_upper(low: int, high: int, matrix: NDArray[Any], order: NDArray[np.int64]) -> None:
    """matrix[i, j] = matrix[max(a, b), min(a, b)] for i < j, where a and b are order[i] and order[j]."""
    for step in range(low, high):
        row = long_and_short(step, order.size)
        own, a = matrix[row], order[row]
        beside = matrix[a]
        for j in range(row + 1, order.size):
            b = order[j]
            own[j] = beside[b] if b < a else matrix[b, a]


@parallel()
def mirror_bands(low: int, high: int, matrix: NDArray[Any], upper: bool) -> None:
    """Write the upper triangle of a matrix [n, n] over the lower one, or the lower over the upper one; a step is a band
    of SQUARE rows of the lower one."""
    size = len(matrix)
    bands = -(-size // SQUARE)
    for step in range(low, high):
        start = long_and_short(step, bands) * SQUARE
        end = min(start + SQUARE, size)
        whole = start if end - start == SQUARE else 0
        for left in range(0, whole, SQUARE):
            below, above = start * size + left, left * size + start
            if upper:
                turn_square(matrix, above, size, matrix, below, size)
            else:
                turn_square(matrix, below, size, matrix, above, size)
        for i in range(start, end):
            for j in range(whole, i):
                if upper:
                    matrix[i, j] = matrix[j, i]
                else:
                    matrix[j, i] = matrix[i, j]
