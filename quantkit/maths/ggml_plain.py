"""Encoders of ggml's plain types for the CPU, in one pass over the weights; other devices take the tensor operations of
quantkit/maths/ggml.py, which give the same bytes.

Extremes are found on the bits of the floats, as integers: their order is the same, and unlike that of floats it may be
looked for in any order, so the loops are vectorized. Source: llama.cpp, ggml/src/ggml-quants.c, the
quantize_row_*_ref functions.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import njit  # type: ignore[import-untyped]
from numpy.typing import NDArray

from quantkit.maths.ggml_bits import put_half
from quantkit.maths.parallel import parallel

Encoder = Callable[[NDArray[np.float32], NDArray[np.uint8]], None]

_BLOCK = 32
_TOGETHER = 64
"""Blocks that a thread takes at once."""

_MAGNITUDE = np.int32(0x7FFFFFFF)


@njit(forceinline=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _reciprocal(scale: np.float32) -> np.float32:
    return np.float32(1.0) / scale if scale != np.float32(0.0) else np.float32(0.0)


@njit(forceinline=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _magnitude(x: NDArray[np.float32]) -> np.float32:
    """The largest magnitude of a block."""
    bits = x.view(np.int32)
    most = np.int32(0)
    for j in range(_BLOCK):
        most = max(most, np.int32(bits[j] & _MAGNITUDE))
    return np.int32(most).view(np.float32)


@njit(forceinline=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _ends(x: NDArray[np.float32]) -> tuple[np.float32, np.float32]:
    """The least and the largest value; a zero may have either sign."""
    bits = x.view(np.int32)
    least, most = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    for j in range(_BLOCK):
        # negative floats are ordered backwards by their bits
        ordered = np.int32(bits[j] ^ ((bits[j] >> np.int32(31)) & _MAGNITUDE))
        least, most = min(least, ordered), max(most, ordered)
    low = np.int32(least ^ ((least >> np.int32(31)) & _MAGNITUDE)).view(np.float32)
    high = np.int32(most ^ ((most >> np.int32(31)) & _MAGNITUDE)).view(np.float32)
    return low, high


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _first_zero(x: NDArray[np.float32]) -> np.float32:
    """The first zero of a block, with its sign, as a scan for an extreme finds it."""
    for j in range(_BLOCK):
        if x[j] == np.float32(0.0):
            return x[j]
    return np.float32(0.0)


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _first_of(x: NDArray[np.float32], magnitude: np.float32) -> np.float32:
    """The first value of this magnitude."""
    for j in range(_BLOCK):
        if abs(x[j]) == magnitude:
            return x[j]
    return magnitude


@njit(forceinline=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _largest(x: NDArray[np.float32]) -> np.float32:
    """The value of largest magnitude, the first on a tie; a positive zero where all are zeros."""
    low, high = _ends(x)
    if high == -low:
        return _first_of(x, high) + np.float32(0.0)
    return high if high > -low else low


@njit(forceinline=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _put_codes(
    x: NDArray[np.float32],
    low: np.float32,
    inverse: np.float32,
    shift: np.float32,
    top: np.int32,
    row: NDArray[np.uint8],
) -> None:
    """Codes `(x - low) * inverse + shift`, which is above 0, truncated: their fifth bits where `top` is 31, then
    nibbles.

    All are 0 where the scale is so small that it has no finite reciprocal, as on the reference implementation's
    processor.
    """
    if not abs(inverse) < np.float32(np.inf):
        row[:] = 0
        return
    at = 0
    if top == 31:
        fifth = np.uint32(0)
        for j in range(_BLOCK):
            code = min(top, np.int32((x[j] - low) * inverse + shift))
            fifth |= np.uint32(code >> 4) << np.uint32(j)
        for byte in range(4):
            row[byte] = np.uint8((fifth >> np.uint32(8 * byte)) & np.uint32(0xFF))
        at = 4
    first, second, out = x[:16], x[16:], row[at:]
    for j in range(16):
        lower = min(top, np.int32((first[j] - low) * inverse + shift))
        upper = min(top, np.int32((second[j] - low) * inverse + shift))
        out[j] = np.uint8((lower & 15) | (upper & 15) << 4)


@parallel()
def _encode_four_five(
    low: int, high: int, blocks: NDArray[np.float32], top: np.int32, symmetric: bool, out: NDArray[np.uint8]
) -> None:
    """Q4_0, Q5_0 (symmetric), Q4_1, Q5_1. blocks: [blocks, 32]. top: the largest code. out: uint8 [blocks, bytes]."""
    half, zero = np.float32((top + 1) // 2), np.float32(0.0)
    for unit in range(low, high):
        for b in range(unit * _TOGETHER, min((unit + 1) * _TOGETHER, blocks.shape[0])):
            x, row = blocks[b], out[b]
            if symmetric:
                scale = _largest(x) / -half
                put_half(row, 0, scale)
                _put_codes(x, zero, _reciprocal(scale), half + np.float32(0.5), top, row[2:])
            else:
                least, most = _ends(x)
                if least == zero or most == zero:
                    least = _first_zero(x) if least == zero else least
                    most = _first_zero(x) if most == zero else most
                scale = (most - least) / np.float32(top)
                put_half(row, 0, scale)
                put_half(row, 2, least)
                _put_codes(x, least, _reciprocal(scale), np.float32(0.5), top, row[4:])


@parallel()
def _encode_eight(low: int, high: int, blocks: NDArray[np.float32], out: NDArray[np.uint8]) -> None:
    """Q8_0. Arrays as in `_encode_four_five`."""
    half = np.float32(0.5)
    for unit in range(low, high):
        for b in range(unit * _TOGETHER, min((unit + 1) * _TOGETHER, blocks.shape[0])):
            x, row = blocks[b], out[b]
            scale = _magnitude(x) / np.float32(127.0)
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


def _units(blocks: NDArray[np.float32]) -> int:
    return -(-len(blocks) // _TOGETHER)


def _four_five(top: int, symmetric: bool) -> Encoder:
    return lambda blocks, out: _encode_four_five(_units(blocks), blocks, np.int32(top), symmetric, out)


ENCODERS: dict[str, Encoder] = {
    "Q8_0": lambda blocks, out: _encode_eight(_units(blocks), blocks, out),
    "Q4_0": _four_five(15, True),
    "Q4_1": _four_five(15, False),
    "Q5_0": _four_five(31, True),
    "Q5_1": _four_five(31, False),
}
"""Weights [blocks, 32] to bytes [blocks, bytes], for each plain type."""
