"""Products of a row with lanes: exact where they can be, in one order, and nothing beside them."""

from __future__ import annotations

import numpy as np
import pytest
from numba import njit
from numba.core.errors import TypingError
from numpy.typing import NDArray

from quantkit.maths.lane_products import LANES, add_products


@njit
def added(factors: NDArray[np.float32], lanes: NDArray[np.float32], sums: NDArray[np.float32]) -> None:
    add_products(factors, lanes, sums)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 16, 63, 128])
def test_whole_numbers_come_out_exactly(count: int) -> None:
    draw = np.random.default_rng(count)
    factors = draw.integers(-50, 50, count + 2).astype(np.float32)
    lanes = draw.integers(-50, 50, (count + 2, LANES)).astype(np.float32)
    sums = draw.integers(-50, 50, (3, LANES)).astype(np.float32)
    before = sums.copy()
    added(factors[1:-1], lanes[1:-1], sums[1])
    np.testing.assert_array_equal(sums[1], before[1] + factors[1:-1] @ lanes[1:-1])
    np.testing.assert_array_equal(sums[[0, 2]], before[[0, 2]])


def test_a_lane_is_added_up_the_same_way_wherever_it_is() -> None:
    draw = np.random.default_rng(0)
    factors, lane = draw.standard_normal(101, np.float32), draw.standard_normal(101, np.float32)
    sums = np.full(LANES, np.float32(0.3))
    added(factors, np.ascontiguousarray(np.repeat(lane[:, None], LANES, axis=1)), sums)
    assert len(set(sums.tolist())) == 1
    assert sums[0] == pytest.approx(0.3 + factors.astype(np.float64) @ lane.astype(np.float64), abs=1e-5)


def test_what_is_not_a_number_stays_in_its_lane() -> None:
    lanes = np.ones((5, LANES), np.float32)
    lanes[3, 40] = np.nan
    sums = np.zeros(LANES, np.float32)
    added(np.ones(5, np.float32), lanes, sums)
    assert np.isnan(sums).nonzero()[0].tolist() == [40]


def test_other_types_are_refused_where_they_are_compiled() -> None:
    numbers = np.ones(4, np.float32)
    for factors, sums in ((numbers.astype(np.float64), np.ones(LANES, np.float32)), (numbers[::2], numbers)):
        with pytest.raises(TypingError, match="takes float32 in one piece"):
            added(factors, np.ones((4, LANES), np.float32), sums)
