"""Encoders of ggml's IQ4 types: four-bit codes into sixteen levels that lie closer together near zero.

Source: llama.cpp, ggml/src/ggml-quants.c, quantize_row_iq4_nl_impl.
"""

from __future__ import annotations

import numpy as np
from numba import njit  # type: ignore[import-untyped]
from numpy.typing import NDArray

from quantkit.maths.ggml_bits import clamped, pack_nibbles, put_half
from quantkit.maths.ggml_k import Encoder, load, mean_square, units_of
from quantkit.maths.ggml_search import (
    LANES,
    LARGEST,
    MAGNITUDE,
    SCALE,
    SMALLEST,
    STATE_ROWS,
    find_largest,
)
from quantkit.maths.parallel import parallel

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The sixteen levels: llama.cpp's kvalues_iq4nl."""

_LOWEST = np.float32(LEVELS[0])
_STEP = np.diff(np.array(LEVELS, dtype=np.float32))
_BORDER = np.array(LEVELS[1:], dtype=np.float32) - _STEP / 2
"""Middles between neighbours: a value on a border belongs to the upper one. Differences near a border are exact in
float32, so that comparing with it is the same as comparing the distances to both levels."""

_GROUP = 32
_REACH = 7
_BEST, _TRY, _PRODUCT, _NORM = range(6, 10)  # rows of the state that the search uses on its way


@njit(forceinline=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _level(value: np.float32) -> np.float32:
    """The level nearest to a value."""
    level = _LOWEST
    for i in range(15):
        level += np.float32(0.0) if value < _BORDER[i] else _STEP[i]
    return level


@njit(forceinline=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _code(value: np.float32) -> int:
    """The number of the level nearest to a value."""
    code = 0
    for i in range(15):
        code += 0 if value < _BORDER[i] else 1
    return code


@njit(forceinline=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _search(values: NDArray[np.float32], weights: NDArray[np.float32], state: NDArray[np.float32]) -> None:
    """Scale of each lane, the best of several for the value of largest magnitude, by weighted least squares.

    values, weights: [32, LANES]. state: [STATE_ROWS, LANES], receives SCALE.
    """
    zero = np.float32(0.0)
    find_largest(values, state)
    for k in range(LANES):
        state[SCALE, k] = zero
        state[_BEST, k] = zero
    for candidate in range(-1, 2 * _REACH + 1):
        for k in range(LANES):
            if candidate < 0:
                state[_TRY, k] = np.float32(1.0) / (-state[LARGEST, k] / _LOWEST)
            else:
                state[_TRY, k] = (np.float32(candidate - _REACH) + _LOWEST) / state[LARGEST, k]
            state[_PRODUCT, k] = zero
            state[_NORM, k] = zero
        for j in range(_GROUP):
            x, w = values[j], weights[j]
            for k in range(LANES):
                level = _level(state[_TRY, k] * x[k])
                state[_PRODUCT, k] += w[k] * level * x[k]
                state[_NORM, k] += w[k] * level * level
        for k in range(LANES):
            product, norm = state[_PRODUCT, k], state[_NORM, k]
            better = norm > zero and (candidate < 0 or product * product > state[_BEST, k] * norm)
            scale = product / norm
            state[SCALE, k] = scale if better else state[SCALE, k]
            state[_BEST, k] = scale * product if better else state[_BEST, k]
    for k in range(LANES):
        state[SCALE, k] = zero if state[MAGNITUDE, k] < SMALLEST else state[SCALE, k]


@parallel()
def _encode(
    low: int, high: int, blocks: NDArray[np.float32], importance: NDArray[np.float32], out: NDArray[np.uint8]
) -> None:
    """IQ4_NL (blocks of 32) and IQ4_XS (super-blocks of eight groups whose scales are levels of a float16).

    blocks: [blocks, 32 or 256]. importance: [blocks of a row, 32 or 256], or of no rows. out: uint8 [blocks, bytes].
    """
    width = blocks.shape[1]
    groups = width // _GROUP
    at_once = LANES // groups
    weighted = importance.shape[0] > 0
    zero, one = np.float32(0.0), np.float32(1.0)
    for unit in range(low, high):
        values = np.empty((_GROUP, LANES), np.float32)
        weights = np.empty((_GROUP, LANES), np.float32)
        state = np.empty((STATE_ROWS, LANES), np.float32)
        sums = np.zeros(LANES, np.float32)
        codes = np.empty(width, np.uint8)
        load(blocks, unit * at_once, _GROUP, importance, values, weights)
        mine = min(at_once, blocks.shape[0] - unit * at_once)
        if weighted:
            for s in range(mine):
                sums[s * groups : (s + 1) * groups] = np.float32(2.0) * mean_square(blocks[unit * at_once + s])
        for j in range(_GROUP):
            x, w = values[j], weights[j]
            for k in range(LANES):
                w[k] = w[k] * np.sqrt(sums[k] + x[k] * x[k]) if weighted else x[k] * x[k]
        _search(values, weights, state)
        for s in range(mine):
            row, scales = out[unit * at_once + s], state[SCALE, s * groups : (s + 1) * groups]
            block = blocks[unit * at_once + s]
            if groups == 1:
                put_half(row, 0, scales[0])
                inverse = one / scales[0] if scales[0] != zero else zero
                for j in range(_GROUP):
                    codes[j] = _code(inverse * block[j])
                pack_nibbles(codes, 16, row[2:])
                continue
            largest = zero
            for g in range(groups):
                largest = scales[g] if abs(scales[g]) > abs(largest) else largest
            step = -largest / np.float32(32.0)
            put_half(row, 0, step)
            inverse = one / step if step != zero else zero
            row[2:8] = 0
            for g in range(groups):
                level = clamped(inverse * scales[g], np.int32(-32), np.int32(31))
                own = step * np.float32(level)
                own_inverse = one / own if own != zero else zero
                x, c = block[g * _GROUP : (g + 1) * _GROUP], codes[g * _GROUP : (g + 1) * _GROUP]
                for j in range(_GROUP):
                    c[j] = _code(own_inverse * x[j])
                row[2 + g // 4] |= ((level + 32) >> 4) << 2 * (g % 4)
                row[4 + g // 2] |= ((level + 32) & 15) << 4 * (g % 2)
            pack_nibbles(codes, 16, row[8:])


def _encoder(bytes_: int) -> Encoder:
    def encode(blocks: NDArray[np.float32], importance: NDArray[np.float32]) -> NDArray[np.uint8]:
        out = np.empty((len(blocks), bytes_), np.uint8)
        _encode(units_of(blocks, blocks.shape[1] // _GROUP), blocks, importance, out)
        return out

    return encode


ENCODERS: dict[str, Encoder] = {"IQ4_NL": _encoder(18), "IQ4_XS": _encoder(136)}
"""The encoder of each IQ4 type."""
