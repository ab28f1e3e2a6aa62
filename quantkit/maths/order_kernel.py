"""A compiled loop that brings the columns of a matrix into another order, which PyTorch does one number at a time."""

from __future__ import annotations

from typing import Any

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
