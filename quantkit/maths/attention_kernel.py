"""Compiled causal attention for AVX-512, by tiles of products in float32 (`maths/float_kernel.py`) or, where the
processor has units for them, bfloat16 (`maths/bfloat16_kernel.py`).

Of the scores a few queries' are all that is held: they are multiplied, turned into weights and gathered by while they
are in the cache, and what a query may not see is left out by tiles.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types  # type: ignore[import-untyped]
from numba.extending import overload  # type: ignore[import-untyped]
from numpy.typing import NDArray

from quantkit.maths.bfloat16_kernel import PAIR, add_bfloat16
from quantkit.maths.float_bits import stored_as, value_of
from quantkit.maths.float_kernel import TILE_COLUMNS, add_steps, lay_panel
from quantkit.maths.int_kernel import TILE_ROWS
from quantkit.maths.parallel import FASTMATH, long_and_short, parallel
from quantkit.maths.softmax_kernel import LANES, POWERS, powers_of

QUERIES = 4 * TILE_ROWS
"""Of a head that one thread takes together: as many as serve a panel of keys, which comes from the second-level cache.
"""


# What differs by the kind of numbers, float32 or the bits of bfloat16: a word of a panel is one of the former or a pair
# of the latter.


def _multiply(left, places, right, depth, sums, step):  # type: ignore[no-untyped-def]
    """Sums of a tile, as `add_steps` and `add_bfloat16` have them."""


@overload(_multiply, inline="always")  # type: ignore[untyped-decorator]
def _multiply_numbers(left, places, right, depth, sums, step):  # type: ignore[no-untyped-def]
    if isinstance(left.dtype, types.Integer):
        return lambda left, places, right, depth, sums, step: add_bfloat16(left, places, right, depth, sums, step)
    return lambda left, places, right, depth, sums, step: add_steps(left, places, right, depth, sums, step)


def _words(numbers):  # type: ignore[no-untyped-def]
    """An array of numbers as words."""


@overload(_words, inline="always")  # type: ignore[untyped-decorator]
def _words_of(numbers):  # type: ignore[no-untyped-def]
    if isinstance(numbers.dtype, types.Integer):
        return lambda numbers: numbers.view(np.int32)
    return lambda numbers: numbers


def _word(first, second):  # type: ignore[no-untyped-def]
    """The word of a number and, where a word is a pair, the one behind it."""


@overload(_word, inline="always")  # type: ignore[untyped-decorator]
def _word_of(first, second):  # type: ignore[no-untyped-def]
    if isinstance(first, types.Integer):
        return lambda first, second: np.int32(first) | np.int32(second) << np.int32(16)
    return lambda first, second: first


@njit  # type: ignore[untyped-decorator]
def _take_rows(
    source: NDArray[Any], begin: int, step: int, shape: tuple[int, int], rows: NDArray[Any], apart: int
) -> None:
    """Copy `shape` rows and numbers, which begin `step` apart in the source, to where they begin so many numbers apart;
    float32 or the bits of bfloat16, rounded half to even."""
    for row in range(shape[0]):
        start = begin + row * step
        found, own = source[start : start + shape[1]], rows[row * apart :]
        for k in range(shape[1]):
            own[k] = stored_as(value_of(found[k]), own[k])


@parallel()
def lay_heads(
    low: int,
    high: int,
    key: NDArray[Any],
    key_steps: NDArray[np.int64],
    value: NDArray[Any],
    value_steps: NDArray[np.int64],
    shape: tuple[int, int, int],
    keys: NDArray[Any],
    values: NDArray[Any],
) -> None:
    """Keys and values of each head as panels of right factors.

    key, value: float32 or the bits of bfloat16; the steps are from one of a batch, a head and a token to the next.
    shape: tokens, numbers of a key and of a value. keys: [batch, heads, panels, words of a key, TILE_COLUMNS], a column
    for each token. values: [batch, heads, panels, words of all tokens, TILE_COLUMNS], a column for each number of one.
    Both are words of the kind of `value`.
    """
    length, width, wide = shape
    heads, panels, words = keys.shape[1:4]
    sets, depth = values.shape[2:4]
    size = 4 // value.itemsize  # numbers in a word
    rows, none = np.zeros(TILE_COLUMNS * words * size, value.dtype), np.zeros(TILE_COLUMNS, value.dtype)
    for at in range(low, high):
        of, head = at // heads, at % heads
        begin = of * key_steps[0] + head * key_steps[1]
        for panel in range(panels):
            first = panel * TILE_COLUMNS
            there = min(TILE_COLUMNS, length - first)
            _take_rows(key, begin + first * key_steps[2], key_steps[2], (there, width), rows, words * size)
            lay_panel(_words(rows), 0, words, 1, there, keys[of, head, panel])
        begin = of * value_steps[0] + head * value_steps[1]
        for panel in range(sets):
            there = min(TILE_COLUMNS, wide - panel * TILE_COLUMNS)
            for word in range(depth):
                token = word * size
                start = begin + token * value_steps[2] + panel * TILE_COLUMNS
                own, found, behind = values[of, head, panel, word], value[start : start + there], none
                if token + size <= length:
                    start += (size - 1) * value_steps[2]
                    behind = value[start : start + there]
                for k in range(there):
                    own[k] = _word(found[k], behind[k])
                own[there:] = 0


@njit(fastmath=set(FASTMATH), error_model="numpy")  # type: ignore[untyped-decorator]
def _weigh(
    scores: NDArray[np.float32],
    first: int,
    rows: int,
    steps: np.float32,
    lanes: NDArray[np.float32],
    weights: NDArray[Any],
    inverse: NDArray[np.float32],
) -> None:
    """Scores of a tile's queries, from token `first` on, to weights of what they see, and what those are to be
    multiplied by. Weights behind that, up to a word behind what the last query sees, are zero. scores: overwritten."""
    for row in range(rows):
        own, made, seen = scores[row], weights[row], first + row + 1
        end = seen
        if steps > 0.0:  # else what is least below would be the largest
            end = (seen + TILE_COLUMNS - 1) // TILE_COLUMNS * TILE_COLUMNS  # whole vectors
            own[seen:end] = -np.inf
        inverse[row] = np.float32(1.0) / powers_of(own[:end], steps, lanes)
        for k in range(seen):
            made[k] = stored_as(own[k], made[k])
        made[seen : first + rows + PAIR - 1] = 0


@parallel(FASTMATH)
def attend(
    low: int,
    high: int,
    query: NDArray[Any],
    query_steps: NDArray[np.int64],
    keys: NDArray[Any],
    values: NDArray[Any],
    width: int,
    scale: float,
    gathered: NDArray[Any],
) -> None:
    """What each token gathers from itself and those before it.

    query: float32 or the bits of bfloat16; the steps are from one of a batch, a head and a token to the next. keys,
    values: by `lay_heads`. width: numbers of a query. gathered: [batch, length, heads, value width], float32 or the
    bits of bfloat16, as the values were.
    """
    length, heads, wide = gathered.shape[1:]
    groups, panels, words = keys.shape[1:4]
    shared, blocks = heads // groups, (length + QUERIES - 1) // QUERIES  # as `blocks_of`
    stride, columns = words * (4 // gathered.itemsize), panels * TILE_COLUMNS
    steps = np.float32(POWERS * scale)
    asked, scores = np.zeros(QUERIES * stride, gathered.dtype), np.empty((QUERIES, columns), np.float32)
    weights, sums = np.empty((TILE_ROWS, columns), gathered.dtype), np.empty((TILE_ROWS, TILE_COLUMNS), np.float32)
    inverse, places, lanes = np.empty(TILE_ROWS, np.float32), np.empty(TILE_ROWS, np.int64), np.empty(LANES, np.float32)
    for task in range(low, high):
        block, group = long_and_short(task % blocks, blocks), task // blocks
        of, group = group // groups, group % groups
        first, last = block * QUERIES, min((block + 1) * QUERIES, length)
        for head in range(group * shared, (group + 1) * shared):
            begin = of * query_steps[0] + head * query_steps[1] + first * query_steps[2]
            _take_rows(query, begin, query_steps[2], (last - first, width), asked, stride)
            for panel in range((last + TILE_COLUMNS - 1) // TILE_COLUMNS):
                here = panel * TILE_COLUMNS
                for start in range(0, last - first, TILE_ROWS):
                    if here >= first + start + TILE_ROWS:
                        continue  # none of these queries sees so far
                    for row in range(TILE_ROWS):
                        places[row] = (start + row) * stride
                    _multiply(asked, places, keys[of, group, panel], width, scores[start:, here:], columns)
            for start in range(0, last - first, TILE_ROWS):
                top, rows = first + start, min(TILE_ROWS, last - first - start)
                _weigh(scores[start:], top, rows, steps, lanes, weights, inverse)
                for row in range(TILE_ROWS):
                    places[row] = min(row, rows - 1) * columns
                for panel in range(values.shape[2]):
                    here = panel * TILE_COLUMNS
                    _multiply(weights, places, values[of, group, panel], top + rows, sums, TILE_COLUMNS)
                    for row in range(rows):
                        found, factor = sums[row], inverse[row]
                        out = gathered[of, top + row, head, here : min(here + TILE_COLUMNS, wide)]
                        for column in range(out.size):
                            out[column] = stored_as(found[column] * factor, out[column])
