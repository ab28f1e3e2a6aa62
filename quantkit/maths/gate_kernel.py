"""A compiled loop for gated activations, which tensor operations go twice over all tokens for.

Source: Shazeer 2020 (GLU Variants Improve Transformer), section 2, with the logistic function as SiLU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.maths.float_bits import power_of_two, stored_as, value_of
from quantkit.maths.parallel import FASTMATH, parallel

LOG2_E = np.float32(1.4426950408889634)


@parallel(FASTMATH)
def silu_times(low: int, high: int, gate: NDArray[Any], up: NDArray[Any]) -> None:
    """up *= gate / (1 + e^-gate): [tokens, columns] each, float32 or the bits of bfloat16, rounded once at the end.
    Below gates of -88 the sigmoid stays at 6e-39."""
    for i in range(low, high):
        gates, ups = gate[i], up[i]
        for j in range(ups.size):
            value = value_of(gates[j])
            sigmoid = np.float32(1.0) / (np.float32(1.0) + power_of_two(-value * LOG2_E))
            ups[j] = stored_as(value * sigmoid * value_of(ups[j]), ups[j])
