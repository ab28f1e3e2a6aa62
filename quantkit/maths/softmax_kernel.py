"""A compiled softmax over what a query may see, from float32 scores to weights in float32 or bfloat16.

Two passes over scores in the cache, both vectorized.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit  # type: ignore[import-untyped]
from numpy.typing import NDArray

from quantkit.maths.float_bits import power_of_two, stored_as
from quantkit.maths.lane_sum import lane_sum
from quantkit.maths.parallel import FASTMATH, parallel

LANES = 64
"""Scores whose maxima are taken side by side: a maximum over one row after another is not vectorized."""

QUERIES = 16
"""Queries that one thread takes at a time."""


POWERS = 1.4426950408889634
"""2^(POWERS x) is e^x."""


def bands_of(heads: int, queries: int) -> int:
    """How many steps so many scores are."""
    return heads * -(-queries // QUERIES)


@njit(fastmath={"nsz"}, inline="always")  # type: ignore[untyped-decorator]
def _largest(row: NDArray[np.float32], lanes: NDArray[np.float32]) -> np.float32:
    """The largest of a row. lanes: [LANES], overwritten."""
    lanes[:] = -np.inf
    whole = row.size - row.size % LANES
    for start in range(0, whole, LANES):
        part = row[start : start + LANES]
        for k in range(LANES):
            lanes[k] = max(lanes[k], part[k])
    for width in (32, 16, 8):
        for k in range(width):
            lanes[k] = max(lanes[k], lanes[k + width])
    most = np.float32(-np.inf)
    for k in range(8):
        most = max(most, lanes[k])
    for k in range(whole, row.size):
        most = max(most, row[k])
    return most


@njit(fastmath={"contract", "nsz"}, error_model="numpy", inline="always")  # type: ignore[untyped-decorator]
def powers_of(row: NDArray[np.float32], steps: np.float32, lanes: NDArray[np.float32]) -> np.float32:
    """Turn a row of scores into two to the power of `steps` times what each is off the largest; their sum.

    lanes: [LANES], overwritten.
    """
    most = _largest(row, lanes)
    for k in range(row.size):
        row[k] = power_of_two((row[k] - most) * steps)
    return lane_sum(row)


@njit(fastmath={"contract", "nsz"}, error_model="numpy")  # type: ignore[untyped-decorator]
def _soften(
    scores: NDArray[np.float32], weights: NDArray[Any], seen: int, steps: np.float32, lanes: NDArray[np.float32]
) -> None:
    """One query's part of `causal_softmax`: so many keys are `seen`, `steps` turns scores into powers of two."""
    row, own = scores[:seen], weights[:seen]
    inverse = np.float32(1.0) / powers_of(row, steps, lanes)
    for k in range(row.size):
        own[k] = stored_as(row[k] * inverse, own[k])
    weights[seen:] = 0


@parallel(FASTMATH)
def causal_softmax(
    low: int, high: int, scores: NDArray[np.float32], first: int, scale: float, weights: NDArray[Any]
) -> None:
    """Softmax of `scale * scores` over the keys up to a query's own; keys behind it get weight zero.

    scores: [heads, queries, keys], overwritten; its first query is token `first`. weights: [heads, queries, keys],
    float32 or the bits of bfloat16, rounded half to even. The exponential is within 3e-7 of the true one.
    """
    heads, queries, _ = scores.shape
    steps = np.float32(POWERS * scale)
    bands = (queries + QUERIES - 1) // QUERIES
    for at in range(low, high):
        head, lanes = at // bands, np.empty(LANES, np.float32)
        for query in range(at % bands * QUERIES, min((at % bands + 1) * QUERIES, queries)):
            _soften(scores[head, query], weights[head, query], first + query + 1, steps, lanes)
