"""Sums of the compiled loops: in a written order, which neither the compiler nor its cache changes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numba import njit
from numba.core.errors import TypingError
from numpy.typing import NDArray

from quantkit.maths.lane_sum import WIDTHS, lane_sum


@njit
def compiled_sum(values: NDArray[np.float32]) -> np.float32:
    return lane_sum(values)


def in_its_order(values: NDArray[np.float32]) -> np.float32:
    total, start = np.float32(0.0), 0
    for width in WIDTHS:
        end = values.size - values.size % width
        lanes = np.zeros(width, np.float32)
        for at in range(start, end, width):
            lanes += values[at : at + width]
        while lanes.size > 1:
            lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
        total, start = total + lanes[0], end
    return total


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 63, 64, 65, 127, 200, 576, 1000])
def test_sum_is_of_the_written_order_to_the_last_bit(size: int) -> None:
    values = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    assert compiled_sum(values) == in_its_order(values)
    assert compiled_sum(values) == pytest.approx(values.sum(dtype=np.float64), abs=1e-6 * float(np.abs(values).sum()))


def test_sum_behind_an_odd_start_reads_no_other_number() -> None:
    values = np.full(100, 1.0, np.float32)
    values[:3] = values[-3:] = 1e30
    assert compiled_sum(values[3:-3]) == 94.0


def test_sum_carries_what_is_not_a_number() -> None:
    values = np.ones(70, np.float32)
    values[-1] = np.nan
    assert np.isnan(compiled_sum(values))


def test_other_types_are_refused_where_they_are_compiled() -> None:
    with pytest.raises(TypingError, match="takes float32 in one piece"):
        compiled_sum(np.ones(4, np.float64))
    with pytest.raises(TypingError, match="takes float32 in one piece"):
        compiled_sum(np.ones(8, np.float32)[::2])


DIGESTS = """
import hashlib
import numpy as np
from quantkit.maths.correction_kernel import changes
from quantkit.maths.norm_kernel import rms_norm
from quantkit.maths.softmax_kernel import bands_of, causal_softmax

draw = np.random.default_rng(0)
weights = np.empty((18, 128, 512), np.uint16)
causal_softmax(bands_of(18, 128), 8 * draw.standard_normal(weights.shape).astype(np.float32), 384, 0.125, weights)
rows = draw.standard_normal((16, 576), np.float32)
normed = np.empty_like(rows)
rms_norm(16, rows, rows[0], 1e-5, normed)
moved, lengths = np.empty(rows.shape, np.uint16), np.empty((2, 16), np.float32)
changes(16, rows, normed, rows[0], moved, lengths)
made = (weights, normed, moved, lengths)
loaded = [bool(kernel.stats.cache_hits) for kernel in (causal_softmax, rms_norm, changes)]
print(loaded, *(hashlib.sha256(array.tobytes()).hexdigest() for array in made))
"""


def test_loops_from_the_cache_give_the_bytes_of_those_just_compiled(tmp_path: Path) -> None:
    """A run that is killed where they were compiled, and gone on with, ends in the artifact of an undisturbed one."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", DIGESTS]
    runs = [
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
        for _ in range(2)
    ]
    fresh, cached = (run.stdout.split("]") for run in runs)
    assert (fresh[0], cached[0]) == ("[False, False, False", "[True, True, True")
    assert fresh[1] == cached[1]
