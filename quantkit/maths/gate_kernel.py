"""A compiled loop for gated activations, which tensor operations go twice over all tokens for.

Source: Shazeer 2020 (GLU Variants Improve Transformer), section 2, with the logistic function as SiLU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange  # type: ignore[import-untyped]
from numpy.typing import NDArray

from quantkit.maths.float_bits import power_of_two, stored_as, value_of

LOG2_E = np.float32(1.4426950408889634)


@njit(parallel=True, cache=True, fastmath={"contract", "nsz"}, error_model="numpy")  # type: ignore[untyped-decorator]
def silu_times(gate: NDArray[Any], up: NDArray[Any], out: NDArray[Any]) -> None:
    """out = gate / (1 + e^-gate) * up: [tokens, columns] each, float32 or the bits of bfloat16, rounded once at the
    end. Below gates of -88 the sigmoid stays at 6e-39."""
    for i in prange(gate.shape[0]):
        gates, ups, made = gate[i], up[i], out[i]
        for j in range(made.size):
            value = value_of(gates[j])
            sigmoid = np.float32(1.0) / (np.float32(1.0) + power_of_two(-value * LOG2_E))
            made[j] = stored_as(value * sigmoid * value_of(ups[j]), made[j])
