"""Encoders of ggml's plain types of 32 weights a block where the importance of the columns is known.

Source: llama.cpp, ggml/src/ggml-quants.c, quantize_row_q4_0_impl and its neighbours; Q8_0 takes no notice of it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from quantkit.maths.ggml_bits import clamped, pack_nibbles, put_half
from quantkit.maths.ggml_k import WIDE, around, load, ratios_of, units_of
from quantkit.maths.ggml_search import (
    BASE,
    INVERSE,
    LANES,
    MINIMUM,
    SCALE,
    STATE_ROWS,
    search_affine,
    search_symmetric,
)
from quantkit.maths.parallel import parallel

_BLOCK = 32
_ROWS = 8
"""Rows whose squares are summed side by side, each in its own order."""

WeightedEncoder = Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.uint8]]
"""Weights [blocks, 32] and importance [blocks of a row, 32] to bytes."""


@parallel()
def _mean_squares(low: int, high: int, weight: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Mean of the squares of each row, summed in order. weight: [rows, columns]. out: [rows]."""
    rows, columns = weight.shape
    for band in range(low, high):
        first, end = band * _ROWS, min((band + 1) * _ROWS, rows)
        sums = np.zeros(_ROWS, np.float32)
        for j in range(columns):
            for i in range(end - first):
                sums[i] += weight[first + i, j] * weight[first + i, j]
        for i in range(end - first):
            out[first + i] = sums[i] / np.float32(columns)


@parallel()
def _encode(
    low: int,
    high: int,
    blocks: NDArray[np.float32],
    importance: NDArray[np.float32],
    squares: NDArray[np.float32],
    symmetric: bool,
    top: np.int32,
    ratios: NDArray[np.float32],
    out: NDArray[np.uint8],
) -> None:
    """blocks: [blocks, 32]. importance: [blocks of a row, 32]. squares: [rows]. top: the largest code. out: uint8
    [blocks, bytes]."""
    row_blocks = importance.shape[0]
    half, least = np.int32((top + 1) // 2), np.int32(0)
    for unit in range(low, high):
        values = np.empty((_BLOCK, LANES), np.float32)
        weights = np.empty((_BLOCK, LANES), np.float32)
        state = np.empty((STATE_ROWS, LANES), np.float32)
        sums = np.zeros(LANES, np.float32)
        codes = np.empty(_BLOCK, np.uint8)
        mine = min(LANES, blocks.shape[0] - unit * LANES)
        load(blocks, unit * LANES, _BLOCK, importance, values, weights)
        for k in range(mine):
            sums[k] = squares[(unit * LANES + k) // row_blocks]
        for j in range(_BLOCK):
            x, w = values[j], weights[j]
            for k in range(LANES):
                w[k] = w[k] * np.sqrt(sums[k] + x[k] * x[k])
        if symmetric:
            search_symmetric(values, weights, half, ratios, state)
        else:
            search_affine(values, weights, top, ratios, False, state)
        for k in range(mine):
            x, row = blocks[unit * LANES + k], out[unit * LANES + k]
            put_half(row, 0, state[SCALE, k])
            inverse, base, start = state[INVERSE, k], state[BASE, k], 2
            if not symmetric:
                put_half(row, 2, -state[MINIMUM, k])
                start = 4
                for j in range(_BLOCK):
                    codes[j] = clamped(inverse * (x[j] - base), least, top)
            elif base > np.float32(0.0):
                codes[:] = 0
            else:
                for j in range(_BLOCK):
                    codes[j] = half + clamped(inverse * x[j], -half, np.int32(half - np.int32(1)))
            if top == 31:
                for byte in range(4):
                    row[start + byte] = 0
                    for bit in range(8):
                        row[start + byte] |= (codes[8 * byte + bit] >> 4) << bit
                start += 4
            pack_nibbles(codes, 16, row[start:])


def _encoder(symmetric: bool, top: int, bytes_: int) -> WeightedEncoder:
    ratios = around((top + 1) // 2, 9) if symmetric else ratios_of(top, *WIDE)

    def encode(blocks: NDArray[np.float32], importance: NDArray[np.float32]) -> NDArray[np.uint8]:
        out = np.empty((len(blocks), bytes_), np.uint8)
        rows = blocks.reshape(-1, importance.size)
        squares = np.empty(len(rows), np.float32)
        _mean_squares(-(-len(rows) // _ROWS), rows, squares)
        _encode(units_of(blocks, 1), blocks, importance, squares, symmetric, np.int32(top), ratios, out)
        return out

    return encode


ENCODERS: dict[str, WeightedEncoder] = {
    "Q4_0": _encoder(True, 15, 18),
    "Q4_1": _encoder(False, 15, 20),
    "Q5_0": _encoder(True, 31, 22),
    "Q5_1": _encoder(False, 31, 24),
}
"""The encoder of each plain type that has one."""
