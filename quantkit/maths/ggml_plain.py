"""Encoders of ggml's plain types for the CPU, in one pass over the weights; other devices take the tensor operations of
quantkit/maths/ggml.py, which give the same bytes.

Extremes are found on the bits of the floats, as integers: their order is the same, and unlike that of floats it may be
looked for in any order, so the loops are vectorized. Source: llama.cpp, ggml/src/ggml-quants.c, the
quantize_row_*_ref functions.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import njit, prange  # type: ignore[import-untyped]
from numpy.typing import NDArray

from quantkit.maths.ggml_bits import pack_nibbles, put_half

_BLOCK = 32
_TOGETHER = 64
"""Blocks that a thread takes at once."""

_MAGNITUDE = np.int32(0x7FFFFFFF)


@njit(inline="always", error_model="numpy")  # type: ignore[untyped-decorator]
def _reciprocal(scale: np.float32) -> np.float32:
    return np.float32(1.0) / scale if scale != np.float32(0.0) else np.float32(0.0)


@njit(inline="always", error_model="numpy")  # type: ignore[untyped-decorator]
def _truncated(value: np.float32, top: np.int32) -> np.int32:
    """Towards zero, inside [0, top]; 0 for what is not finite, where a scale has no finite reciprocal."""
    finite = abs(value) < np.float32(np.inf)
    code = np.int32(value if finite else np.float32(0.0))
    return max(np.int32(0), min(top, code))


@njit(inline="always", error_model="numpy")  # type: ignore[untyped-decorator]
def _largest(x: NDArray[np.float32]) -> np.float32:
    """The value of largest magnitude, the first on a tie; a positive zero where all are zeros."""
    bits = x.view(np.int32)
    most = np.int32(0)
    for j in range(_BLOCK):
        most = max(most, np.int32(bits[j] & _MAGNITUDE))
    place = np.int32(_BLOCK - 1)
    for j in range(_BLOCK):
        place = min(place, np.int32(j) if np.int32(bits[j] & _MAGNITUDE) == most else np.int32(_BLOCK - 1))
    return x[place] + np.float32(0.0)


@njit(inline="always", error_model="numpy")  # type: ignore[untyped-decorator]
def _ends(x: NDArray[np.float32]) -> tuple[np.float32, np.float32]:
    """The least and the largest value; of zeros of both signs the first, as a scan finds it."""
    bits = x.view(np.int32)
    least, most = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    for j in range(_BLOCK):
        # negative floats are ordered backwards by their bits
        ordered = np.int32(bits[j] ^ ((bits[j] >> np.int32(31)) & _MAGNITUDE))
        least, most = min(least, ordered), max(most, ordered)
    low = np.int32(least ^ ((least >> np.int32(31)) & _MAGNITUDE)).view(np.float32)
    high = np.int32(most ^ ((most >> np.int32(31)) & _MAGNITUDE)).view(np.float32)
    if low == np.float32(0.0) or high == np.float32(0.0):
        for j in range(_BLOCK):
            if x[j] == np.float32(0.0):
                low = x[j] if low == np.float32(0.0) else low
                high = x[j] if high == np.float32(0.0) else high
                break
    return low, high


@njit(inline="always", error_model="numpy")  # type: ignore[untyped-decorator]
def _pack(codes: NDArray[np.uint8], five_bits: bool, row: NDArray[np.uint8], start: int) -> None:
    """Nibbles from `start` on, after the fifth bits of the 32 codes where there are any."""
    if five_bits:
        for byte in range(4):
            packed = 0
            for bit in range(8):
                packed |= (codes[8 * byte + bit] >> 4) << bit
            row[start + byte] = packed
        start += 4
    pack_nibbles(codes, 16, row[start:])


@njit(parallel=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _encode_four_five(blocks: NDArray[np.float32], top: np.int32, symmetric: bool, out: NDArray[np.uint8]) -> None:
    """Q4_0, Q5_0 (symmetric), Q4_1, Q5_1. blocks: [blocks, 32]. top: the largest code. out: uint8 [blocks, bytes]."""
    half = np.float32((top + 1) // 2)
    for unit in prange((blocks.shape[0] + _TOGETHER - 1) // _TOGETHER):
        codes = np.empty(_BLOCK, np.uint8)
        for b in range(unit * _TOGETHER, min((unit + 1) * _TOGETHER, blocks.shape[0])):
            x, row = blocks[b], out[b]
            if symmetric:
                scale = _largest(x) / -half
                inverse = _reciprocal(scale)
                for j in range(_BLOCK):
                    codes[j] = _truncated(x[j] * inverse + (half + np.float32(0.5)), top)
                put_half(row, 0, scale)
                _pack(codes, top == 31, row, 2)
            else:
                low, high = _ends(x)
                scale = (high - low) / np.float32(top)
                inverse = _reciprocal(scale)
                for j in range(_BLOCK):
                    codes[j] = _truncated((x[j] - low) * inverse + np.float32(0.5), top)
                put_half(row, 0, scale)
                put_half(row, 2, low)
                _pack(codes, top == 31, row, 4)


@njit(parallel=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _encode_eight(blocks: NDArray[np.float32], out: NDArray[np.uint8]) -> None:
    """Q8_0. Arrays as in `_encode_four_five`."""
    half = np.float32(0.5)
    for unit in prange((blocks.shape[0] + _TOGETHER - 1) // _TOGETHER):
        for b in range(unit * _TOGETHER, min((unit + 1) * _TOGETHER, blocks.shape[0])):
            x, row = blocks[b], out[b]
            scale = abs(_largest(x)) / np.float32(127.0)
            inverse = _reciprocal(scale)
            put_half(row, 0, scale)
            codes = row[2:]
            for j in range(_BLOCK):
                value = x[j] * inverse
                value = value if abs(value) < np.float32(np.inf) else np.float32(0.0)
                whole = np.int32(value)
                rest = value - np.float32(whole)
                # halves go away from zero, as roundf does
                whole = np.int32(whole + np.int32(1 if rest >= half else -1 if rest <= -half else 0))
                codes[j] = np.uint8(whole & 0xFF)


def _four_five(top: int, symmetric: bool, bytes_: int) -> Callable[[NDArray[np.float32]], NDArray[np.uint8]]:
    def encode(blocks: NDArray[np.float32]) -> NDArray[np.uint8]:
        out = np.empty((len(blocks), bytes_), np.uint8)
        _encode_four_five(blocks, np.int32(top), symmetric, out)
        return out

    return encode


def _eight(blocks: NDArray[np.float32]) -> NDArray[np.uint8]:
    out = np.empty((len(blocks), 34), np.uint8)
    _encode_eight(blocks, out)
    return out


ENCODERS: dict[str, Callable[[NDArray[np.float32]], NDArray[np.uint8]]] = {
    "Q8_0": _eight,
    "Q4_0": _four_five(15, True, 18),
    "Q4_1": _four_five(15, False, 20),
    "Q5_0": _four_five(31, True, 22),
    "Q5_1": _four_five(31, False, 24),
}
"""Weights [blocks, 32] to bytes, for each plain type."""
