"""The compiled loop of `maths/pairs.py`. Inner loops run over slices from 0, as in `maths/kernels.py`."""

from __future__ import annotations

import numpy as np
from numba import njit  # type: ignore[import-untyped]
from numpy.typing import NDArray

from quantkit.maths.parallel import FASTMATH, parallel

SCANNED = 64
"""Columns that are looked at one by one where one of them is worth it."""


@njit(fastmath={"contract", "nsz"})  # type: ignore[untyped-decorator]
def _any_beyond(
    gradient: NDArray[np.float32],
    row: NDArray[np.float32],
    step: NDArray[np.float32],
    up: NDArray[np.float32],
    down: NDArray[np.float32],
    moved: np.float32,
    least: np.float32,
) -> bool:
    """Whether some column gains more than `least` behind a move: counting is vectorized where a maximum is not."""
    beyond = 0
    for k in range(gradient.size):
        behind = step[k] * (gradient[k] + moved * row[k])
        beyond += (behind - down[k] > least) | (-behind - up[k] > least)
    return beyond > 0


@njit(inline="always")  # type: ignore[untyped-decorator]
def _cost(code: int, turn: int, levels: int, curve: np.float32) -> np.float32:
    """What a move of a code costs beside its slope: infinite where it would leave the grid."""
    return curve if 0 <= np.int64(code) + turn < levels else np.float32(np.inf)


@parallel(FASTMATH)
def sweep_pairs(
    low: int,
    high: int,
    codes: NDArray[np.uint8],
    steps: NDArray[np.float32],
    curves: NDArray[np.float32],
    gradient: NDArray[np.float32],
    gram: NDArray[np.float32],
    levels: int,
    least_gain: float,
    dearest: float,
) -> None:
    """For each column in turn its cheaper move by one code, if there is a move of another one that more than pays it.

    codes: [out, columns], updated. steps: [out, columns], what a code more adds to a weight. curves: [out, columns],
    half of what it adds to the loss by itself. gradient: [out, columns], (q - w) H, updated. gram: [columns, columns].
    least_gain, dearest: what a pair has to gain and its first move may cost, as shares of that move's curve. Rows are
    independent and run in parallel.
    """
    rows, columns = codes.shape
    for i in range(low, high):
        code, step, curve, slope = codes[i], steps[i], curves[i], gradient[i]
        up, down = np.empty(columns, np.float32), np.empty(columns, np.float32)
        for k in range(columns):
            up[k], down[k] = _cost(code[k], 1, levels, curve[k]), _cost(code[k], -1, levels, curve[k])
        for j in range(columns):
            row = gram[j]
            falls = step[j] * slope[j]
            first = -1 if falls > 0 else 1
            if not 0 <= np.int64(code[j]) + first < levels:
                continue
            moved = np.float32(first) * step[j]
            least = curve[j] - abs(falls) + np.float32(least_gain) * curve[j]
            if least > np.float32(dearest) * curve[j] or not _any_beyond(slope, row, step, up, down, moved, least):
                continue
            most, at, second = least, -1, 0
            for start in range(0, columns, SCANNED):  # few of them hold a better one
                end = min(start + SCANNED, columns)
                s, r, t, u, d = slope[start:end], row[start:end], step[start:end], up[start:end], down[start:end]
                if not _any_beyond(s, r, t, u, d, moved, most):
                    continue
                for k in range(end - start):
                    behind = t[k] * (s[k] + moved * r[k])
                    gain = behind - d[k] if behind > 0 else -behind - u[k]
                    if gain > most and start + k != j:
                        most, at, second = gain, start + k, -1 if behind > 0 else 1
            if at < 0:
                continue
            code[j] = np.uint8(np.int64(code[j]) + first)
            code[at] = np.uint8(np.int64(code[at]) + second)
            for k in (j, at):
                up[k], down[k] = _cost(code[k], 1, levels, curve[k]), _cost(code[k], -1, levels, curve[k])
            other, also = gram[at], np.float32(second) * step[at]
            for k in range(columns):
                slope[k] += moved * row[k] + also * other[k]
