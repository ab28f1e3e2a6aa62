"""Pieces of compiled loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import njit
from numba.core.errors import TypingError
from numpy.typing import NDArray

from quantkit.maths.vectors import SQUARE, turn_square


@njit
def turned(source: NDArray[Any], begin: int, step: int, target: NDArray[Any], there: int, apart: int) -> None:
    turn_square(source, begin, step, target, there, apart)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.uint16])
def test_a_square_is_turned_and_nothing_beside_it_is_touched(dtype: type) -> None:
    source = np.arange(20 * 17).reshape(20, 17).astype(dtype)
    target = np.full((13, 19), 7, dtype)
    wanted = target.copy()
    wanted[2 : 2 + SQUARE, 5 : 5 + SQUARE] = source[3 : 3 + SQUARE, 1 : 1 + SQUARE].T
    turned(source, 3 * 17 + 1, 17, target, 2 * 19 + 5, 19)
    assert np.array_equal(target, wanted)


def test_other_dtypes_are_refused_where_they_are_compiled() -> None:
    with pytest.raises(TypingError, match="float32 is not float64"):
        turned(np.ones((8, 8), np.float32), 0, 8, np.ones((8, 8)), 0, 8)
