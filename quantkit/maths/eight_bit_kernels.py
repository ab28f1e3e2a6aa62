"""Compiled loops around products of 8-bit integers: inputs to codes, sums of their products to numbers.

Inputs and outputs are float32, or the bits of bfloat16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.maths.float_bits import MAGNITUDE, bits_of, from_bits, stored_as, value_of
from quantkit.maths.parallel import parallel


@parallel()
def round_tokens(
    low: int,
    high: int,
    rows: NDArray[Any],
    factors: NDArray[np.float32],
    codes: NDArray[np.int8],
    steps: NDArray[np.float32],
) -> None:
    """Codes `round(x * factor / step)` from -127 to 127 of each token [tokens, columns], and its step [tokens].

    factors: [columns]. A token that is not finite gets a step that is not.
    """
    for i in range(low, high):
        row, code = rows[i], codes[i]
        largest_bits = np.int32(0)  # magnitudes are in the order of their bits, those that are not finite last
        for j in range(row.shape[0]):
            largest_bits = max(largest_bits, bits_of(value_of(row[j]) * factors[j]) & MAGNITUDE)
        largest = from_bits(largest_bits)
        steps[i] = largest / np.float32(127.0)
        inverse = np.float32(0.0)
        if np.float32(1e-30) < largest < np.inf:
            inverse = np.float32(127.0) / largest
        for j in range(row.shape[0]):
            code[j] = np.int8(np.int32(np.rint(value_of(row[j]) * factors[j] * inverse)))


@parallel()
def scale_products(
    low: int,
    high: int,
    products: NDArray[np.int32],
    along: NDArray[np.float32],
    across: NDArray[np.float32],
    bias: NDArray[np.float32],
    outputs: NDArray[Any],
) -> None:
    """products * along[:, None] * across + bias: [tokens, columns], float32 or the bits of bfloat16."""
    for i in range(low, high):
        found, output, factor = products[i], outputs[i], along[i]
        for j in range(found.shape[0]):
            output[j] = stored_as(np.float32(found[j]) * factor * across[j] + bias[j], output[j])
