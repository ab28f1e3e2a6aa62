"""A compiled loop for gated activations, which tensor operations go twice over all tokens for.

Source: Shazeer 2020 (GLU Variants Improve Transformer), section 2, with the logistic function as SiLU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit  # type: ignore[import-untyped]
from numpy.typing import NDArray

from quantkit.maths.float_bits import power_of_two, stored_as, value_of
from quantkit.maths.parallel import FASTMATH, parallel

LOG2_E = np.float32(1.4426950408889634)


@njit(inline="always")  # type: ignore[untyped-decorator]
def gated(gate: np.float32, up: np.float32) -> np.float32:
    """up * gate / (1 + e^-gate). Below gates of -88 the sigmoid stays at 6e-39."""
    return gate * (np.float32(1.0) / (np.float32(1.0) + power_of_two(-gate * LOG2_E))) * up


@njit(inline="always")  # type: ignore[untyped-decorator]
def gate_row(
    found: NDArray[np.int32],
    factor: np.float32,
    steps: NDArray[np.float32],
    offset: NDArray[np.float32],
    gates: NDArray[Any],
) -> None:
    """`gated` of gates [columns], float32 or the bits of bfloat16, and what `scale_row` of int_kernel.py makes of the
    others, in the gates' place."""
    for column in range(len(gates)):
        up = stored_as(np.float32(found[column]) * factor * steps[column] + offset[column], gates[column])
        gates[column] = stored_as(gated(value_of(gates[column]), value_of(up)), gates[column])


@parallel(FASTMATH)
def silu_times(low: int, high: int, gate: NDArray[Any], up: NDArray[Any]) -> None:
    """up = gated(gate, up): [tokens, columns] each, float32 or the bits of bfloat16, rounded once at the end."""
    for i in range(low, high):
        gates, ups = gate[i], up[i]
        for j in range(ups.size):
            ups[j] = stored_as(gated(value_of(gates[j]), value_of(ups[j])), ups[j])
