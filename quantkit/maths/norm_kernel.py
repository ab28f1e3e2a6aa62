"""A compiled root-mean-square norm: a row stays in the cache, where tensor operations go five times over all rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkit.maths.lane_sum import lane_sum
from quantkit.maths.parallel import FASTMATH, parallel


@parallel(FASTMATH)
def rms_norm(
    low: int, high: int, rows: NDArray[np.float32], gains: NDArray[np.float32], eps: float, out: NDArray[np.float32]
) -> None:
    """out = rows / sqrt(mean(rows^2) + eps) * gains: [tokens, columns]; gains: [columns]."""
    tokens, columns = rows.shape
    for i in range(low, high):
        row, made = rows[i], out[i]
        for j in range(columns):
            made[j] = row[j] * row[j]
        factor = np.float32(1.0) / np.sqrt(lane_sum(made) / np.float32(columns) + np.float32(eps))
        for j in range(columns):
            made[j] = row[j] * factor * gains[j]
