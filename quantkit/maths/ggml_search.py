"""The searches behind ggml's K and IQ types: for each group of weights the scale, and the minimum, that lose least.

A group is one lane. The searches go through LANES groups at once, weight by weight, so that every sum of a group runs
in the order of llama.cpp's scalar loops and rounds as they do, while the processor works on all lanes together. None
of the loops may be compiled with fastmath: a fused or reordered sum gives other bytes.

State is one array [rows, LANES]: rows of one array are known not to overlap, so loops over lanes are vectorized
without checks. Source: llama.cpp, ggml/src/ggml-quants.c, the make_q*_quants functions.
"""

from __future__ import annotations

import numpy as np
from numba import njit  # type: ignore[import-untyped]
from numpy.typing import NDArray

from quantkit.maths.ggml_bits import clamped

LANES = 32
"""Groups that are searched together: two vectors of 16, or four of 8, hide the latency of the sums."""

SMALLEST = np.float32(1e-15)
"""GROUP_MAX_EPS: a group whose largest magnitude is below it counts as zero."""

STATE_ROWS = 14
SCALE, MINIMUM, INVERSE, BASE = 0, 1, 2, 3
"""Rows of the state that hold a search's result: the scale; minus the minimum; and for codes that no scale decides,
`nearest(INVERSE * (value - BASE))`."""
MAGNITUDE, LARGEST = 4, 5
"""Rows that `find_largest` fills."""
_LOW, _HIGH, _SUM_W, _SUM_X, _ERROR, _TRY, _SUM_L, _SUM_LL, _SUM_XL, _LOSS = range(4, 14)


@njit(forceinline=True, error_model="numpy")  # type: ignore[untyped-decorator]
def search_affine(
    values: NDArray[np.float32],
    weights: NDArray[np.float32],
    top: np.int32,
    ratios: NDArray[np.float32],
    absolute: bool,
    state: NDArray[np.float32],
) -> None:
    """Scale and minimum of codes 0 ... top for each lane, by weighted least squares from several starting ranges.

    values, weights: [size, LANES]. ratios: how many steps the range is cut into, one a candidate. absolute: candidates
    are compared by absolute error instead of squared. state: [STATE_ROWS, LANES], receives the result.
    """
    size, zero = values.shape[0], np.float32(0.0)
    for k in range(LANES):
        state[_LOW, k] = values[0, k]
        state[_HIGH, k] = values[0, k]
        state[_SUM_W, k] = weights[0, k]
        state[_SUM_X, k] = weights[0, k] * values[0, k]
    for j in range(1, size):
        x, w = values[j], weights[j]
        for k in range(LANES):
            state[_LOW, k] = x[k] if x[k] < state[_LOW, k] else state[_LOW, k]
            state[_HIGH, k] = x[k] if x[k] > state[_HIGH, k] else state[_HIGH, k]
            state[_SUM_W, k] += w[k]
            state[_SUM_X, k] += w[k] * x[k]
    for k in range(LANES):
        state[_LOW, k] = zero if state[_LOW, k] > zero else state[_LOW, k]
        state[INVERSE, k] = np.float32(top) / (state[_HIGH, k] - state[_LOW, k])
        state[SCALE, k] = np.float32(1.0) / state[INVERSE, k]
        state[BASE, k] = state[_LOW, k]
        state[MINIMUM, k] = state[_LOW, k]
        state[_ERROR, k] = zero
    for j in range(size):
        x, w = values[j], weights[j]
        for k in range(LANES):
            code = np.float32(clamped(state[INVERSE, k] * (x[k] - state[_LOW, k]), np.int32(0), top))
            apart = state[SCALE, k] * code + state[_LOW, k] - x[k]
            apart = abs(apart) if absolute else apart * apart
            state[_ERROR, k] += w[k] * apart
    for candidate in range(ratios.size):
        ratio = ratios[candidate]
        for k in range(LANES):
            state[_TRY, k] = ratio / (state[_HIGH, k] - state[MINIMUM, k])
            state[_SUM_L, k] = zero
            state[_SUM_LL, k] = zero
            state[_SUM_XL, k] = zero
        for j in range(size):
            x, w = values[j], weights[j]
            for k in range(LANES):
                code = np.float32(clamped(state[_TRY, k] * (x[k] - state[MINIMUM, k]), np.int32(0), top))
                part = w[k] * code
                state[_SUM_L, k] += part
                state[_SUM_LL, k] += part * code
                state[_SUM_XL, k] += part * x[k]
        _fit(state)
        for j in range(size):
            x, w = values[j], weights[j]
            for k in range(LANES):
                code = np.float32(clamped(state[_TRY, k] * (x[k] - state[MINIMUM, k]), np.int32(0), top))
                apart = state[_SUM_XL, k] * code + state[_SUM_L, k] - x[k]
                apart = abs(apart) if absolute else apart * apart
                state[_LOSS, k] += w[k] * apart
        for k in range(LANES):
            better = state[_SUM_LL, k] > zero and state[_LOSS, k] < state[_ERROR, k]
            state[_ERROR, k] = state[_LOSS, k] if better else state[_ERROR, k]
            state[INVERSE, k] = state[_TRY, k] if better else state[INVERSE, k]
            state[BASE, k] = state[MINIMUM, k] if better else state[BASE, k]
            state[SCALE, k] = state[_SUM_XL, k] if better else state[SCALE, k]
            state[MINIMUM, k] = state[_SUM_L, k] if better else state[MINIMUM, k]
    for k in range(LANES):
        flat = state[_HIGH, k] <= state[_LOW, k]
        state[SCALE, k] = zero if flat else state[SCALE, k]
        state[INVERSE, k] = zero if flat else state[INVERSE, k]
        state[BASE, k] = zero if flat else state[BASE, k]
        state[MINIMUM, k] = -state[_LOW, k] if flat else -state[MINIMUM, k]


@njit(forceinline=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _fit(state: NDArray[np.float32]) -> None:
    """Least squares of value = scale * code + minimum from the sums; a minimum above zero is held at zero.

    The scale replaces _SUM_XL, the minimum _SUM_L and the determinant, which tells whether they count, _SUM_LL.
    """
    zero = np.float32(0.0)
    for k in range(LANES):
        sum_w, sum_x = state[_SUM_W, k], state[_SUM_X, k]
        sum_l, sum_ll, sum_xl = state[_SUM_L, k], state[_SUM_LL, k], state[_SUM_XL, k]
        determinant = sum_w * sum_ll - sum_l * sum_l
        scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        minimum = (sum_ll * sum_x - sum_l * sum_xl) / determinant
        held = minimum > zero
        state[_SUM_XL, k] = sum_xl / sum_ll if held else scale
        state[_SUM_L, k] = zero if held else minimum
        state[_SUM_LL, k] = determinant
        state[_LOSS, k] = zero


@njit(forceinline=True, error_model="numpy")  # type: ignore[untyped-decorator]
def find_largest(values: NDArray[np.float32], state: NDArray[np.float32]) -> None:
    """Of each lane the value of largest magnitude, the first on a tie, and that magnitude, into their rows."""
    for k in range(LANES):
        state[MAGNITUDE, k] = np.float32(0.0)
        state[LARGEST, k] = np.float32(0.0)
    for j in range(values.shape[0]):
        x = values[j]
        for k in range(LANES):
            larger = abs(x[k]) > state[MAGNITUDE, k]
            state[LARGEST, k] = x[k] if larger else state[LARGEST, k]
            state[MAGNITUDE, k] = abs(x[k]) if larger else state[MAGNITUDE, k]


@njit(forceinline=True, error_model="numpy")  # type: ignore[untyped-decorator]
def search_symmetric(
    values: NDArray[np.float32],
    weights: NDArray[np.float32],
    half: np.int32,
    ratios: NDArray[np.float32],
    state: NDArray[np.float32],
) -> None:
    """Scale of codes -half ... half - 1 for each lane, the best of several starting ranges by weighted least squares.

    values, weights: [size, LANES]. ratios: codes that the largest magnitude may lie on, the first of them half itself.
    state: [STATE_ROWS, LANES], receives SCALE and INVERSE, and in BASE a 1 for a lane of zeros, whose codes are
    the lowest.
    """
    size, zero = values.shape[0], np.float32(0.0)
    find_largest(values, state)
    for k in range(LANES):
        state[SCALE, k] = zero
        state[INVERSE, k] = zero
        state[_ERROR, k] = zero
    for candidate in range(ratios.size):
        ratio = ratios[candidate]
        for k in range(LANES):
            state[_TRY, k] = -ratio / state[LARGEST, k]
            state[_SUM_XL, k] = zero
            state[_SUM_LL, k] = zero
        for j in range(size):
            x, w = values[j], weights[j]
            for k in range(LANES):
                code = np.float32(clamped(state[_TRY, k] * x[k], -half, np.int32(half - np.int32(1))))
                state[_SUM_XL, k] += w[k] * x[k] * code
                state[_SUM_LL, k] += w[k] * code * code
        for k in range(LANES):
            product, norm = state[_SUM_XL, k], state[_SUM_LL, k]
            if candidate == 0:
                better = True
                scale = product / norm if norm != zero else zero
            else:
                better = norm > zero and product * product > state[_ERROR, k] * norm
                scale = product / norm
            state[SCALE, k] = scale if better else state[SCALE, k]
            state[_ERROR, k] = scale * product if better else state[_ERROR, k]
            state[INVERSE, k] = state[_TRY, k] if better else state[INVERSE, k]
    for k in range(LANES):
        flat = state[MAGNITUDE, k] < SMALLEST
        state[SCALE, k] = zero if flat else state[SCALE, k]
        state[INVERSE, k] = zero if flat else state[INVERSE, k]
        state[BASE, k] = np.float32(1.0) if flat else zero


@njit(forceinline=True, error_model="numpy")  # type: ignore[untyped-decorator]
def search_by_steps(
    values: NDArray[np.float32], half: np.int32, codes: NDArray[np.float32], state: NDArray[np.float32]
) -> None:
    """Scale of codes -half ... half - 1 for each lane: round to the largest magnitude, then up to five sweeps that
    move one code at a time. Weights are the squares of the values.

    values: [size, LANES]. codes: [size, LANES], receives the codes plus half, 0 in a lane of zeros. state: receives
    SCALE.
    """
    size, zero = values.shape[0], np.float32(0.0)
    least, most = -half, np.int32(half - np.int32(1))
    find_largest(values, state)
    for k in range(LANES):
        state[_TRY, k] = -np.float32(half) / state[LARGEST, k]
        state[_SUM_XL, k] = zero
        state[_SUM_LL, k] = zero
    for j in range(size):
        x = values[j]
        for k in range(LANES):
            code = np.float32(clamped(state[_TRY, k] * x[k], least, most))
            codes[j, k] = code
            state[_SUM_XL, k] += x[k] * x[k] * x[k] * code
            state[_SUM_LL, k] += x[k] * x[k] * code * code
    for _ in range(5):
        for k in range(LANES):
            state[_LOSS, k] = zero  # how many codes of the lane have moved
        for j in range(size):
            x = values[j]
            for k in range(LANES):
                w, code = x[k] * x[k], codes[j, k]
                product, norm = state[_SUM_XL, k], state[_SUM_LL, k]
                rest = product - w * x[k] * code
                rest_norm = norm - w * code * code
                moved = np.float32(clamped(x[k] * rest_norm / rest, least, most))
                new = rest + w * x[k] * moved
                new_norm = rest_norm + w * moved * moved
                better = (
                    rest > zero
                    and moved != code
                    and new_norm > zero
                    and new * new * norm > product * product * new_norm
                )
                codes[j, k] = moved if better else code
                state[_SUM_XL, k] = new if better else product
                state[_SUM_LL, k] = new_norm if better else norm
                state[_LOSS, k] += np.float32(1.0) if better else zero
        moved_codes = zero
        for k in range(LANES):
            moved_codes = max(moved_codes, state[_LOSS, k])
        if moved_codes == zero:
            break
    for k in range(LANES):
        flat = state[MAGNITUDE, k] < SMALLEST
        state[SCALE, k] = state[_SUM_XL, k] / state[_SUM_LL, k] if state[_SUM_LL, k] > zero and not flat else zero
        state[BASE, k] = np.float32(1.0) if flat else zero
    for j in range(size):
        for k in range(LANES):
            codes[j, k] = zero if state[BASE, k] > zero else codes[j, k] + np.float32(half)
