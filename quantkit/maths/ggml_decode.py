"""Decoders of ggml's K and IQ4 types: the layouts of quantkit/maths/ggml_k.py and ggml_iq4.py, read back.

gguf-py decodes them too, several times slower and with copies of the whole matrix. Source: llama.cpp,
ggml/src/ggml-quants.c, dequantize_row_q*_K and dequantize_row_iq4_*.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import njit  # type: ignore[import-untyped]
from numpy.typing import NDArray

from quantkit.maths.ggml_bits import half_value
from quantkit.maths.ggml_iq4 import LEVELS
from quantkit.maths.parallel import parallel

_LEVELS = np.array(LEVELS, dtype=np.float32)


@njit(forceinline=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _half(row: NDArray[np.uint8], start: int) -> np.float32:
    return half_value(np.int32(np.int32(row[start]) | np.int32(row[start + 1]) << 8))


@parallel()
def _decode_small(low: int, high: int, data: NDArray[np.uint8], bits: int, out: NDArray[np.float32]) -> None:
    """Q2_K, Q3_K and Q6_K: groups of 16. data: [super-blocks, bytes]. out: [super-blocks, 256]."""
    for s in range(low, high):
        row, values = data[s], out[s]
        scale = _half(row, 80 if bits == 2 else row.size - 2)
        least = _half(row, 82) if bits == 2 else np.float32(0.0)
        for g in range(16):
            first, shift = 32 * (g // 8) + 16 * (g % 2), 2 * (g // 2 % 4)  # of the low two bits
            v = values[16 * g :]
            if bits == 2:
                step, base = scale * np.float32(row[g] & 15), least * np.float32(row[g] >> 4)
                codes = row[16 + first :]
                for j in range(16):
                    v[j] = step * np.float32((codes[j] >> shift) & 3) - base
            elif bits == 3:
                four = row[96 + g % 8] >> 4 * (g // 8) & 15
                level = np.int32(four | (row[104 + g % 4] >> 2 * (g // 4) & 3) << 4) - 32
                step = scale * np.float32(level)
                codes, upper, bit = row[32 + first :], row[16 * (g % 2) :], g // 2
                for j in range(16):
                    code = np.int32((codes[j] >> shift) & 3) - np.int32(0 if upper[j] >> bit & 1 else 4)
                    v[j] = step * np.float32(code)
            else:
                step = scale * np.float32(np.int32(row[192 + g]) - (256 if row[192 + g] > 127 else 0))
                nibbles, side = row[64 * (g // 8) + 16 * (g % 4) :], 4 * (g // 4 % 2)
                upper = row[128 + first :]
                for j in range(16):
                    code = np.int32((nibbles[j] >> side & 15) | (upper[j] >> shift & 3) << 4) - 32
                    v[j] = step * np.float32(code)


@parallel()
def _decode_affine(low: int, high: int, data: NDArray[np.uint8], bits: int, out: NDArray[np.float32]) -> None:
    """Q4_K and Q5_K: groups of 32 with a minimum. Arrays as in `_decode_small`."""
    for s in range(low, high):
        row, values = data[s], out[s]
        scale, least = _half(row, 0), _half(row, 2)
        levels, fifth, nibbles = row[4:], row[16:], row[row.size - 128 :]
        for g in range(8):
            if g < 4:
                level, minimum = levels[g] & 63, levels[g + 4] & 63
            else:
                level = (levels[g + 4] & 15) | (levels[g - 4] >> 6) << 4
                minimum = (levels[g + 4] >> 4) | (levels[g] >> 6) << 4
            step, base = scale * np.float32(level), least * np.float32(minimum)
            v, codes, side = values[32 * g :], nibbles[32 * (g // 2) :], 4 * (g % 2)
            if bits == 4:
                for j in range(32):
                    v[j] = step * np.float32(codes[j] >> side & 15) - base
            else:
                for j in range(32):
                    v[j] = step * np.float32((codes[j] >> side & 15) | (fifth[j] >> g & 1) << 4) - base


@parallel()
def _decode_iq4(low: int, high: int, data: NDArray[np.uint8], groups: int, out: NDArray[np.float32]) -> None:
    """IQ4_NL, one group a block, and IQ4_XS, eight. data: [blocks, bytes]. out: [blocks, 32 * groups]."""
    for s in range(low, high):
        row = data[s]
        scale, step = _half(row, 0), np.float32(0.0)
        for g in range(groups):
            step = scale
            if groups > 1:
                level = (row[4 + g // 2] >> 4 * (g % 2) & 15) | (row[2 + g // 4] >> 2 * (g % 4) & 3) << 4
                step = scale * np.float32(np.int32(level) - 32)
            codes, v = row[(8 if groups > 1 else 2) + 16 * g :], out[s, 32 * g :]
            for j in range(16):
                v[j] = step * _LEVELS[codes[j] & 15]
                v[j + 16] = step * _LEVELS[codes[j] >> 4]


Decoder = Callable[[NDArray[np.uint8], NDArray[np.float32]], None]

DECODERS: dict[str, Decoder] = {
    "Q2_K": lambda data, out: _decode_small(len(data), data, 2, out),
    "Q3_K": lambda data, out: _decode_small(len(data), data, 3, out),
    "Q4_K": lambda data, out: _decode_affine(len(data), data, 4, out),
    "Q5_K": lambda data, out: _decode_affine(len(data), data, 5, out),
    "Q6_K": lambda data, out: _decode_small(len(data), data, 6, out),
    "IQ4_NL": lambda data, out: _decode_iq4(len(data), data, 1, out),
    "IQ4_XS": lambda data, out: _decode_iq4(len(data), data, 8, out),
}
"""Bytes [blocks, bytes] into weights [blocks, block], for each type that has a decoder here."""
