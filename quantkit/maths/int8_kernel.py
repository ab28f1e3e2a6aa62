"""A compiled loop that quantizes rows to int8 as bitsandbytes does, each row in the processor's inner cache.

As tensor operations the same takes eight passes over memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit  # type: ignore[import-untyped]
from numpy.typing import NDArray

from quantkit.maths.float_bits import MAGNITUDE, bits_of, from_bits, value_of

_SUBNORMAL = np.float32(2.0**-14)
"""Smaller magnitudes have fewer bits in float16 than in bfloat16."""

_ROUNDER = np.float32(0.75)
"""Float32 values just above it lie 2^-24 apart, as the subnormal ones of float16 do: adding it rounds to those."""

_LARGEST = np.float32(65504.0)
"""Of float16; the bfloat16 above it is infinite there."""

_INTEGERS = np.float32(1.5 * 2**23)
"""Float32 values just above and below it lie 1 apart: adding it rounds to the nearest, to even where two are."""


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def quantize_rows(rows: NDArray[Any], codes: NDArray[np.int8], absmax: NDArray[np.float32]) -> None:
    """`codes = round(x * (1 / absmax * 127))`, and the largest magnitude of each row: [rows, columns], and [rows].

    rows: the bits of bfloat16, rounded to float16 here, or float32 values that float16 holds. A row that is
    not finite gets an absmax that is not; a row of zeros gets codes of 0.
    """
    for i in range(rows.shape[0]):
        row, code = rows[i], codes[i]
        largest_bits = np.int32(0)  # magnitudes are in the order of their bits, those that are not finite last
        for j in range(row.shape[0]):
            largest_bits = max(largest_bits, bits_of(value_of(row[j])) & MAGNITUDE)
        largest = from_bits(largest_bits)
        if not largest <= _LARGEST:
            absmax[i] = np.inf
            continue
        if largest < _SUBNORMAL:
            largest = (largest + _ROUNDER) - _ROUNDER
        absmax[i] = largest
        factor = np.float32(0.0)
        if largest > 0:  # tensors divide a number by way of the reciprocal, which decides where roundings are close
            factor = np.float32(1.0) / largest * np.float32(127.0)
        for j in range(row.shape[0]):
            number = value_of(row[j])
            sign = bits_of(number) & ~MAGNITUDE
            size = from_bits(bits_of(number) & MAGNITUDE)
            rounded = (size + _ROUNDER) - _ROUNDER if size < _SUBNORMAL else size
            scaled = from_bits(bits_of(rounded) | sign) * factor
            code[j] = np.int8(np.int32((scaled + _INTEGERS) - _INTEGERS))
