"""A compiled loop over the inputs of a linear on two ways: how far each token has moved, and how long it is."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.maths.float_bits import stored_as, value_of
from quantkit.maths.lane_sum import lane_sum
from quantkit.maths.parallel import FASTMATH, parallel


@parallel(FASTMATH)
def changes(
    low: int,
    high: int,
    unquantized: NDArray[Any],
    inputs: NDArray[Any],
    factors: NDArray[np.float32],
    change: NDArray[np.uint16],
    lengths: NDArray[np.float32],
) -> None:
    """change = unquantized * factors - inputs, as the bits of bfloat16: [tokens, columns]; factors: [columns].

    unquantized, inputs: float32, or the bits of bfloat16. lengths: [2, tokens] receives the squared lengths of inputs
    and of changes.
    """
    tokens, columns = inputs.shape
    for i in range(low, high):
        before, now, moved = unquantized[i], inputs[i], change[i]
        own, apart = np.empty(columns, np.float32), np.empty(columns, np.float32)
        for j in range(columns):
            value = value_of(now[j])
            difference = value_of(before[j]) * factors[j] - value
            own[j], apart[j] = value * value, difference * difference
            moved[j] = stored_as(difference, moved[j])
        lengths[0, i], lengths[1, i] = lane_sum(own), lane_sum(apart)
