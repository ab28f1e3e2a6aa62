"""Scales of one super-block as levels of a single scale: the second of the two steps of ggml's K types.

Source: llama.cpp, ggml/src/ggml-quants.c, make_qp_quants and make_qx_quants.
"""

from __future__ import annotations

import numpy as np
from numba import njit  # type: ignore[import-untyped]
from numpy.typing import NDArray

from quantkit.maths.ggml_bits import clamped, nearest
from quantkit.maths.ggml_search import SMALLEST


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _search_positive(
    values: NDArray[np.float32],
    weights: NDArray[np.float32],
    top: np.int32,
    ratios: NDArray[np.float32],
    codes: NDArray[np.int32],
) -> np.float32:
    """Scale of codes 0 ... top for a few numbers that are not negative: several ranges, then single codes moved.

    values, weights: [count]. ratios: as in `search_symmetric`. codes: [count], receives the codes.
    """
    zero, count = np.float32(0.0), values.size
    largest = zero
    for i in range(count):
        largest = max(largest, values[i])
    codes[:] = 0
    if largest < SMALLEST:
        return zero
    inverse, least = zero, zero
    for candidate in range(ratios.size):
        trial = ratios[candidate] / largest
        back = np.float32(1.0) / trial
        loss = zero
        for i in range(count):
            apart = values[i] - back * np.float32(min(top, nearest(trial * values[i])))
            loss += weights[i] * apart * apart
        if candidate == 0 or loss < least:
            inverse, least = trial, loss
    product, norm = zero, zero
    for i in range(count):
        codes[i] = min(top, nearest(inverse * values[i])) & 0xFF
        code = np.float32(codes[i])
        product += weights[i] * values[i] * code
        norm += weights[i] * code * code
    for _ in range(5):
        changed = False
        for i in range(count):
            w, x, code = weights[i], values[i], np.float32(codes[i])
            rest = product - w * x * code
            rest_norm = norm - w * code * code
            if rest > zero and rest_norm > zero:
                moved = min(top, nearest(x * rest_norm / rest))
                if moved != codes[i]:
                    code = np.float32(moved)
                    rest += w * x * code
                    rest_norm += w * code * code
                    if rest * rest * norm > product * product * rest_norm:
                        codes[i] = moved & 0xFF
                        product, norm = rest, rest_norm
                        changed = True
        if not changed:
            break
    return product / norm if norm > zero else zero


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def positive_levels(
    values: NDArray[np.float32],
    top: np.int32,
    ratios: NDArray[np.float32],
    weights: NDArray[np.float32],
    weighted: bool,
    levels: NDArray[np.int32],
) -> np.float32:
    """Scales or minima of one super-block as levels 0 ... top of one scale, which is returned."""
    if weighted:
        scale = _search_positive(values, weights, top, ratios, levels)
        for g in range(values.size):
            levels[g] = min(top, levels[g])
        return scale
    largest = np.float32(0.0)
    for g in range(values.size):
        largest = max(largest, values[g])
    inverse = np.float32(top) / largest if largest > np.float32(0.0) else np.float32(0.0)
    for g in range(values.size):
        levels[g] = min(top, nearest(inverse * values[g]) & 0xFF)
    return largest / np.float32(top)


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def signed_levels(
    values: NDArray[np.float32], weights: NDArray[np.float32], ratios: NDArray[np.float32], levels: NDArray[np.int32]
) -> np.float32:
    """Q3_K's scales of one super-block as levels -32 ... 31 of one scale, which is returned; weighted least squares."""
    zero, least, most = np.float32(0.0), np.int32(-32), np.int32(31)
    largest = zero
    for value in values:
        largest = value if abs(value) > abs(largest) else largest
    levels[:] = least
    if abs(largest) < SMALLEST:
        return zero
    scale, best = zero, zero
    for candidate in range(ratios.size):
        inverse, product, norm = -ratios[candidate] / largest, zero, zero
        for g in range(values.size):
            code = np.float32(clamped(inverse * values[g], least, most))
            product += weights[g] * values[g] * code
            norm += weights[g] * code * code
        if candidate == 0 or (norm > zero and product * product > best * norm):
            scale = product / norm if norm != zero else zero
            best = scale * product
            for g in range(values.size):
                levels[g] = clamped(inverse * values[g], least, most)
    return scale
