"""Compiled loops that bring columns and rows of a matrix into another order; PyTorch does one number at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.maths.parallel import parallel


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
    last = order.size - 1
    for step in range(low, high):
        row = step // 2 if step % 2 == 0 else last - step // 2  # long and short rows in turn, so that shares are even
        own, a = matrix[row], order[row]
        beside = matrix[a]
        for j in range(row + 1, order.size):
            b = order[j]
            own[j] = beside[b] if b < a else matrix[b, a]
