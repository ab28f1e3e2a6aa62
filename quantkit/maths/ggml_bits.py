"""What the compiled encoders of ggml's types share below their searches: rounding, float16 and packed codes.

Source: llama.cpp, ggml/src/ggml-quants.c and ggml-impl.h.
"""

from __future__ import annotations

import numpy as np
from numba import njit  # type: ignore[import-untyped]
from numpy.typing import NDArray

_MAGIC = np.float32(12582912.0)  # 1.5 * 2**23: added to a small number, it leaves the nearest integer in the low bits
_MANTISSA = np.int32(0x7FFFFF)
_MIDDLE = np.int32(0x400000)


@njit(forceinline=True, error_model="numpy")  # type: ignore[untyped-decorator]
def nearest(value: np.float32) -> np.int32:
    """The nearest integer, half to even, below 2**22 in magnitude; beyond it, and for what is not finite, what the same
    bits give in llama.cpp."""
    shifted = np.float32(value + _MAGIC)
    return np.int32(np.int32(shifted.view(np.int32) & _MANTISSA) - _MIDDLE)


@njit(forceinline=True, error_model="numpy")  # type: ignore[untyped-decorator]
def clamped(value: np.float32, least: np.int32, most: np.int32) -> np.int32:
    """`nearest` inside [least, most]."""
    return max(least, min(most, nearest(value)))


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def half_bits(value: np.float32) -> np.int32:
    """The bits of the nearest float16, half to even."""
    bits = np.int64(np.float32(value).view(np.uint32))
    sign, magnitude = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
    if magnitude > 0x7F800000:
        return np.int32(sign | 0x7E00)
    if magnitude >= 0x477FF000:  # from the middle between 65504 and 65536 on
        return np.int32(sign | 0x7C00)
    exponent = magnitude >> 23
    if exponent >= 113:  # normal: 2**-14 and more
        kept = magnitude - (112 << 23)
        return np.int32(sign | ((kept + 0x0FFF + ((kept >> 13) & 1)) >> 13))
    if exponent < 102:  # below half of the smallest
        return np.int32(sign)
    mantissa, shift = (magnitude & 0x7FFFFF) | 0x800000, 126 - exponent
    half = (1 << (shift - 1)) - 1
    return np.int32(sign | ((mantissa + half + ((mantissa >> shift) & 1)) >> shift))


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def half_value(bits: np.int32) -> np.float32:
    """The value of a float16 from its bits."""
    exponent, mantissa = (bits >> 10) & 31, bits & 0x3FF
    if exponent == 31:
        value = np.float32(np.inf) if mantissa == 0 else np.float32(np.nan)
    elif exponent == 0:
        value = np.float32(np.float32(mantissa) * np.float32(2.0**-24))
    else:
        value = np.uint32(((exponent + 112) << 23) | (mantissa << 13)).view(np.float32)
    return -value if bits & 0x8000 else value


@njit(forceinline=True, error_model="numpy")  # type: ignore[untyped-decorator]
def put_half(row: NDArray[np.uint8], start: int, value: np.float32) -> np.float32:
    """Store a float16 at two bytes of a row; the value that was stored."""
    bits = half_bits(value)
    row[start], row[start + 1] = np.uint8(bits & 0xFF), np.uint8(bits >> 8)
    return half_value(bits)


@njit(forceinline=True, error_model="numpy")  # type: ignore[untyped-decorator]
def pack_crumbs(codes: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """The low two bits of 256 codes: byte l of each half holds codes l, l + 32, l + 64 and l + 96, the first lowest."""
    for half in range(2):
        c, to = codes[128 * half :], out[32 * half :]
        for j in range(32):
            to[j] = (c[j] & 3) | (c[32 + j] & 3) << 2 | (c[64 + j] & 3) << 4 | (c[96 + j] & 3) << 6


@njit(forceinline=True, error_model="numpy")  # type: ignore[untyped-decorator]
def pack_nibbles(codes: NDArray[np.uint8], width: int, out: NDArray[np.uint8]) -> None:
    """The low four bits of codes: in each run of 2 * width, byte l holds code l low and code l + width high."""
    for start in range(0, codes.size // 2, width):
        c, to = codes[2 * start :], out[start:]
        for j in range(width):
            to[j] = (c[j] & 15) | (c[width + j] & 15) << 4


@njit(forceinline=True, error_model="numpy")  # type: ignore[untyped-decorator]
def pack_top_bits(codes: NDArray[np.uint8], bit: int, out: NDArray[np.uint8]) -> None:
    """One bit of 256 codes: byte l holds those of codes l, l + 32 ... l + 224, the first lowest."""
    out[:32] = 0
    for part in range(8):
        c = codes[32 * part :]
        for j in range(32):
            out[j] |= ((c[j] >> bit) & 1) << part


@njit(forceinline=True, error_model="numpy")  # type: ignore[untyped-decorator]
def pack_six(codes: NDArray[np.uint8], low: NDArray[np.uint8], high: NDArray[np.uint8]) -> None:
    """256 codes of six bits: four of them as nibbles 64 apart, two as in `pack_crumbs`."""
    for half in range(2):
        c = codes[128 * half :]
        to, top = low[64 * half :], high[32 * half :]
        for j in range(64):
            to[j] = (c[j] & 15) | (c[64 + j] & 15) << 4
        for j in range(32):
            top[j] = c[j] >> 4 | (c[32 + j] >> 4) << 2 | (c[64 + j] >> 4) << 4 | (c[96 + j] >> 4) << 6


@njit(forceinline=True, error_model="numpy")  # type: ignore[untyped-decorator]
def pack_levels(scales: NDArray[np.int32], minima: NDArray[np.int32], out: NDArray[np.uint8]) -> None:
    """Eight scales and eight minima of six bits in twelve bytes: the upper two bits of the last four lie above the
    first four."""
    for j in range(4):
        out[j] = scales[j] | (scales[j + 4] >> 4) << 6
        out[j + 4] = minima[j] | (minima[j + 4] >> 4) << 6
        out[j + 8] = (scales[j + 4] & 15) | (minima[j + 4] & 15) << 4


@njit(forceinline=True, error_model="numpy")  # type: ignore[untyped-decorator]
def pack_signed_levels(levels: NDArray[np.int32], out: NDArray[np.uint8]) -> None:
    """Sixteen levels -32 ... 31 in twelve bytes: four low bits each, then the upper two of each."""
    for j in range(8):
        out[j] = ((levels[j] + 32) & 15) | ((levels[j + 8] + 32) & 15) << 4
    for j in range(4):
        out[8 + j] = 0
        for part in range(4):
            out[8 + j] |= ((levels[4 * part + j] + 32) >> 4) << 2 * part
