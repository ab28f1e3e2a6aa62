"""Encoders of ggml's K types: super-blocks of 256 weights whose groups have scales that are themselves quantized.

Source: llama.cpp, ggml/src/ggml-quants.c, quantize_row_q*_K_ref and quantize_row_q*_K_impl.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import njit  # type: ignore[import-untyped]
from numpy.typing import NDArray

from quantkit.maths.ggml_bits import (
    clamped,
    nearest,
    pack_crumbs,
    pack_levels,
    pack_nibbles,
    pack_signed_levels,
    pack_six,
    pack_top_bits,
    put_half,
)
from quantkit.maths.ggml_levels import positive_levels, signed_levels
from quantkit.maths.ggml_search import (
    BASE,
    INVERSE,
    LANES,
    MINIMUM,
    SCALE,
    SMALLEST,
    STATE_ROWS,
    search_affine,
    search_by_steps,
    search_symmetric,
)
from quantkit.maths.parallel import parallel

SUPER_BLOCK = 256

Encoder = Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.uint8]]
"""Weights [super-blocks, 256] and importance [super-blocks of a row, 256], of no rows where there is none, to bytes."""


def ratios_of(top: int, first: float, step: float, count: int) -> NDArray[np.float32]:
    """How many steps a range is cut into, as float32 sums in the order of make_qkx2_quants."""
    steps = np.float32(step) * np.arange(count + 1, dtype=np.float32)
    return np.float32(first) + steps + np.float32(top)


def around(top: int, reach: int) -> NDArray[np.float32]:
    """`top`, then `top` changed by tenths up to `reach` of them, downwards first."""
    steps = [0, *range(-reach, 0), *range(1, reach + 1)]
    return np.float32(0.1) * np.array(steps, dtype=np.float32) + np.float32(top)


def units_of(blocks: NDArray[np.float32], groups: int) -> int:
    """How many steps such blocks are, of so many groups each, where LANES groups are taken together."""
    return -(-len(blocks) // (LANES // groups))


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def load(
    blocks: NDArray[np.float32],
    first: int,
    size: int,
    importance: NDArray[np.float32],
    values: NDArray[np.float32],
    weights: NDArray[np.float32],
) -> None:
    """Turn super-blocks from `first` on so that groups of `size` are lanes: values [size, LANES]; and their importance,
    where there is one, weights [size, LANES]. Lanes past the last block are zeros."""
    groups = blocks.shape[1] // size
    for s in range(LANES // groups):
        block, lane = first + s, s * groups
        if block >= blocks.shape[0]:
            values[:, lane : lane + groups] = 0
            weights[:, lane : lane + groups] = 0
            continue
        row = blocks[block]
        for j in range(size):
            out = values[j, lane:]
            for g in range(groups):
                out[g] = row[g * size + j]
        if importance.shape[0]:
            row = importance[block % importance.shape[0]]
            for j in range(size):
                out = weights[j, lane:]
                for g in range(groups):
                    out[g] = row[g * size + j]


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def mean_square(row: NDArray[np.float32]) -> np.float32:
    """Mean of the squares of a row, summed in order."""
    total = np.float32(0.0)
    for j in range(row.size):
        total += row[j] * row[j]
    return total / np.float32(row.size)


@parallel()
def _encode_affine(
    low: int,
    high: int,
    blocks: NDArray[np.float32],
    importance: NDArray[np.float32],
    size: int,
    top: np.int32,
    ratios: NDArray[np.float32],
    level_ratios: NDArray[np.float32],
    out: NDArray[np.uint8],
) -> None:
    """Q2_K (groups of 16), Q4_K and Q5_K (of 32): a scale and a minimum a group, both as levels of a float16.

    blocks: [super-blocks, 256]. importance: [super-blocks of a row, 256] or [0, 256]. out: uint8 [super-blocks, bytes].
    """
    groups = SUPER_BLOCK // size
    at_once = LANES // groups
    weighted = importance.shape[0] > 0
    level_top = np.int32(15) if top == 3 else np.int32(63)
    least = np.int32(0)
    for unit in range(low, high):
        values = np.empty((size, LANES), np.float32)
        weights = np.empty((size, LANES), np.float32)
        state = np.empty((STATE_ROWS, LANES), np.float32)
        sums = np.zeros(LANES, np.float32)
        levels = np.empty((2, groups), np.int32)
        codes = np.empty(SUPER_BLOCK, np.uint8)
        load(blocks, unit * at_once, size, importance, values, weights)
        if weighted:
            factor = np.float32(1.0) if top == 3 else np.float32(2.0)
            for s in range(min(at_once, blocks.shape[0] - unit * at_once)):
                sums[s * groups : (s + 1) * groups] = factor * mean_square(blocks[unit * at_once + s])
            for j in range(size):
                x, w = values[j], weights[j]
                for k in range(LANES):
                    w[k] = w[k] * np.sqrt(sums[k] + x[k] * x[k])
            sums[:] = 0
            for j in range(size):
                for k in range(LANES):
                    sums[k] += weights[j, k]
        else:
            if top != 3:
                for j in range(size):
                    for k in range(LANES):
                        sums[k] += values[j, k] * values[j, k]
                for k in range(LANES):
                    sums[k] = np.sqrt(sums[k] / np.float32(size))
            for j in range(size):
                for k in range(LANES):
                    weights[j, k] = sums[k] + abs(values[j, k])
        search_affine(values, weights, top, ratios, top == 3 and not weighted, state)
        for s in range(min(at_once, blocks.shape[0] - unit * at_once)):
            row, lane = out[unit * at_once + s], s * groups
            own = slice(lane, lane + groups)
            scale = positive_levels(state[SCALE, own], level_top, level_ratios, sums[own], weighted, levels[0])
            minimum = positive_levels(state[MINIMUM, own], level_top, level_ratios, sums[own], weighted, levels[1])
            if top == 3:
                scale, minimum = put_half(row, 80, scale), put_half(row, 82, minimum)
            else:
                scale, minimum = put_half(row, 0, scale), put_half(row, 2, minimum)
            for g in range(groups):
                step, shift = scale * np.float32(levels[0, g]), minimum * np.float32(levels[1, g])
                x, c = blocks[unit * at_once + s, g * size : (g + 1) * size], codes[g * size : (g + 1) * size]
                if step == np.float32(0.0):
                    inverse, base = state[INVERSE, lane + g], state[BASE, lane + g]
                    for j in range(size):
                        c[j] = clamped(inverse * (x[j] - base), least, top)
                else:
                    for j in range(size):
                        c[j] = clamped((x[j] + shift) / step, least, top)
            if top == 3:
                for g in range(groups):
                    row[g] = levels[0, g] | levels[1, g] << 4
                pack_crumbs(codes, row[16:80])
            else:
                pack_levels(levels[0], levels[1], row[4:16])
                if top == 31:
                    pack_top_bits(codes, 4, row[16:48])
                pack_nibbles(codes, 32, row[row.size - 128 :])


@parallel()
def _encode_symmetric(
    low: int,
    high: int,
    blocks: NDArray[np.float32],
    importance: NDArray[np.float32],
    half: np.int32,
    ratios: NDArray[np.float32],
    level_ratios: NDArray[np.float32],
    out: NDArray[np.uint8],
) -> None:
    """Q3_K and Q6_K: groups of 16 with a signed scale as a level of a float16. Arrays as in `_encode_affine`."""
    size, groups, zero = 16, 16, np.float32(0.0)
    at_once = LANES // groups
    weighted = importance.shape[0] > 0
    stepwise = half == 4 and not weighted
    most = np.int32(half - np.int32(1))
    level_half = np.int32(32) if half == 4 else np.int32(128)
    for unit in range(low, high):
        values = np.empty((size, LANES), np.float32)
        weights = np.empty((size, LANES), np.float32)
        state = np.empty((STATE_ROWS, LANES), np.float32)
        sums = np.zeros(LANES, np.float32)
        levels = np.empty(groups, np.int32)
        codes = np.empty(SUPER_BLOCK, np.uint8)
        load(blocks, unit * at_once, size, importance, values, weights)
        if weighted and half == 4:
            for s in range(min(at_once, blocks.shape[0] - unit * at_once)):
                sums[s * groups : (s + 1) * groups] = np.float32(2.0) * mean_square(blocks[unit * at_once + s])
            for j in range(size):
                x, w = values[j], weights[j]
                for k in range(LANES):
                    w[k] = w[k] * np.sqrt(sums[k] + x[k] * x[k])
            sums[:] = 0
            for j in range(size):
                for k in range(LANES):
                    sums[k] += weights[j, k]
        elif not weighted:
            for j in range(size):
                for k in range(LANES):
                    weights[j, k] = values[j, k] * values[j, k]
        if stepwise:
            search_by_steps(values, half, weights, state)  # the codes take the place of the weights
        else:
            search_symmetric(values, weights, half, ratios, state)
        for s in range(min(at_once, blocks.shape[0] - unit * at_once)):
            row, lane = out[unit * at_once + s], s * groups
            scales = state[SCALE, lane : lane + groups]
            largest = zero
            for g in range(groups):
                largest = scales[g] if abs(scales[g]) > abs(largest) else largest
            if half != 4 and abs(largest) < SMALLEST:
                row[:] = 0
                continue
            if half == 4 and weighted:
                scale = signed_levels(scales, sums[lane : lane + groups], level_ratios, levels)
            elif largest != zero:
                inverse = -np.float32(level_half) / largest
                for g in range(groups):
                    levels[g] = min(level_half - 1, nearest(inverse * scales[g]))
                    if half == 4:
                        levels[g] = max(-level_half, levels[g])
                scale = np.float32(1.0) / inverse
            else:
                levels[:] = -level_half
                scale = zero
            scale = put_half(row, row.size - 2, scale)
            for g in range(groups):
                step = scale * np.float32(levels[g])
                x, c = blocks[unit * at_once + s, g * size : (g + 1) * size], codes[g * size : (g + 1) * size]
                if step != zero:
                    for j in range(size):
                        c[j] = half + clamped(x[j] / step, -half, most)
                elif stepwise:
                    for j in range(size):
                        c[j] = weights[j, lane + g]
                elif state[BASE, lane + g] > zero:
                    c[:] = 0
                else:
                    inverse = state[INVERSE, lane + g]
                    for j in range(size):
                        c[j] = half + clamped(inverse * x[j], -half, most)
            if half == 4:
                pack_top_bits(codes, 2, row[0:32])
                pack_crumbs(codes, row[32:96])
                pack_signed_levels(levels, row[96:108])
            else:
                pack_six(codes, row[0:128], row[128:192])
                for g in range(groups):
                    row[192 + g] = levels[g] & 0xFF


WIDE = (-0.9, 0.05, 36)
"""Ranges that a weighted search starts from: the first, the step, and how many steps follow it."""


def _affine(top: int, size: int, plain: tuple[float, float, int], bytes_: int) -> Encoder:
    searched = {False: ratios_of(top, *plain), True: ratios_of(top, *WIDE)}
    levels = around(15 if top == 3 else 63, 4)

    def encode(blocks: NDArray[np.float32], importance: NDArray[np.float32]) -> NDArray[np.uint8]:
        out = np.empty((len(blocks), bytes_), np.uint8)
        _encode_affine(
            units_of(blocks, SUPER_BLOCK // size),
            blocks,
            importance,
            size,
            np.int32(top),
            searched[len(importance) > 0],
            levels,
            out,
        )
        return out

    return encode


def _symmetric(half: int, bytes_: int) -> Encoder:
    ratios, levels = around(half, 9), around(32, 9)

    def encode(blocks: NDArray[np.float32], importance: NDArray[np.float32]) -> NDArray[np.uint8]:
        out = np.empty((len(blocks), bytes_), np.uint8)
        _encode_symmetric(units_of(blocks, 16), blocks, importance, np.int32(half), ratios, levels, out)
        return out

    return encode


ENCODERS: dict[str, Encoder] = {
    "Q2_K": _affine(3, 16, (-0.5, 0.1, 15), 84),
    "Q3_K": _symmetric(4, 110),
    "Q4_K": _affine(15, 32, (-1.0, 0.1, 20), 144),
    "Q5_K": _affine(31, 32, (-0.5, 0.1, 15), 176),
    "Q6_K": _symmetric(32, 210),
}
"""The encoder of each K type."""
