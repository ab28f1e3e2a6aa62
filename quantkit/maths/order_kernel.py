"""A compiled loop that brings the columns of a matrix into another order, which PyTorch does one number at a time."""

from __future__ import annotations

from typing import Any

from numba import njit, prange  # type: ignore[import-untyped]
from numpy.typing import NDArray


@njit(parallel=True, cache=True)  # type: ignore[untyped-decorator]
def pick(matrix: NDArray[Any], rows: NDArray[Any], columns: NDArray[Any], out: NDArray[Any]) -> None:
    """out[i, j] = matrix[rows[i], columns[j]]."""
    for i in prange(rows.size):
        found, own = matrix[rows[i]], out[i]
        for j in range(columns.size):
            own[j] = found[columns[j]]
