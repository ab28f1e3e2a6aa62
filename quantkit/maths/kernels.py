"""Compiled loops for the CPU, where a column of a block depends on the one before and no tensor operation helps."""

from __future__ import annotations

import numpy as np
from numba import njit, prange  # type: ignore[import-untyped]
from numpy.typing import NDArray


@njit(parallel=True, cache=True, fastmath={"contract", "nsz"})  # type: ignore[untyped-decorator]
def round_block(
    work: NDArray[np.float32],
    scale: NDArray[np.float32],
    middle: NDArray[np.float32],
    upper: NDArray[np.float32],
    levels: int,
    codes: NDArray[np.uint8],
    errors: NDArray[np.float32],
) -> None:
    """GPTQ's inner loop over one block of columns; rows are independent and run in parallel.

    work: [out, columns], overwritten. scale, middle: [out, columns]. upper: [columns, columns]. codes and errors
    [out, columns] receive the result. Sums run in one fixed order a row, so the result does not depend on the threads.
    """
    rows, columns = work.shape
    top = np.float32(levels - 1)
    for i in prange(rows):
        for j in range(columns):
            value = work[i, j]
            step = scale[i, j]
            code = np.rint(value / step + middle[i, j])
            code = min(max(code, np.float32(0.0)), top)
            error = (value - (code - middle[i, j]) * step) / upper[j, j]
            codes[i, j] = np.uint8(code)
            errors[i, j] = error
            for k in range(j + 1, columns):
                work[i, k] -= error * upper[j, k]


@njit(parallel=True, cache=True, fastmath={"contract", "nsz"})  # type: ignore[untyped-decorator]
def descend_block(
    codes: NDArray[np.uint8],
    scale: NDArray[np.float32],
    middle: NDArray[np.float32],
    gradient: NDArray[np.float32],
    gram: NDArray[np.float32],
    levels: int,
    change: NDArray[np.float32],
) -> None:
    """One sweep of coordinate descent over one block of columns; rows are independent and run in parallel.

    codes: [out, columns], updated. scale, middle: [out, columns]. gradient: [out, columns], (q - w) H, kept up to date
    inside the block. gram: [columns, columns]. change: [out, columns] receives the new value minus the old.
    """
    rows, columns = gradient.shape
    top = np.float32(levels - 1)
    for i in prange(rows):
        for j in range(columns):
            step = scale[i, j]
            old = np.float32(codes[i, j])
            wanted = (old - middle[i, j]) * step - gradient[i, j] / gram[j, j]
            code = np.rint(wanted / step + middle[i, j])
            code = min(max(code, np.float32(0.0)), top)
            moved = (code - old) * step
            change[i, j] = moved
            if code != old:
                codes[i, j] = np.uint8(code)
                for k in range(columns):
                    gradient[i, k] += moved * gram[j, k]


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
