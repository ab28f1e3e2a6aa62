"""A compiled loop for rotary positions, which tensor operations go five times over all heads for.

Source: Su et al. 2021 (RoFormer), with the halves of a head as the pairs, as models of the Llama family have them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.maths.float_bits import value_of
from quantkit.maths.parallel import parallel


@parallel()
def rotate(
    low: int,
    high: int,
    heads: NDArray[Any],
    cosines: NDArray[np.float32],
    sines: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    """out = heads * cosines + (-second half, first half of each head) * sines.

    heads: [batch, length, heads, width], float32 or the bits of bfloat16. cosines, sines: [length, width]. out: [batch,
    heads, length, width]. Products and sums are rounded one by one, as tensor operations round them.
    """
    batch, length, count, width = heads.shape
    half = width // 2
    for at in range(low, high):
        i, j = at // length, at % length
        cosine, sine = cosines[j], sines[j]
        for h in range(count):
            head, made = heads[i, j, h], out[i, h, j]
            for k in range(half):
                first, second = value_of(head[k]), value_of(head[k + half])
                made[k] = first * cosine[k] + -second * sine[k]
                made[k + half] = second * cosine[k + half] + first * sine[k + half]
