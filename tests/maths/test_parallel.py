"""Loops shared out among threads: every step once, any arguments, and code that the next process finds again."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from numpy.typing import NDArray

from quantkit.maths.parallel import parallel


@parallel()
def count_steps(low: int, high: int, seen: NDArray[np.int64], by: NDArray[np.int64]) -> None:
    """One more for each step, and the first step of the share that it was in."""
    for at in range(low, high):
        seen[at] += 1
        by[at] = low


@parallel()
def mix(
    low: int, high: int, matrix: NDArray[Any], factor: float, shift: int, negate: bool, out: NDArray[np.float64]
) -> None:
    for i in range(low, high):
        for j in range(matrix.shape[1]):
            value = matrix[i, j] * factor + shift
            out[i, j] = -value if negate else value


@parallel()
def divide(low: int, high: int, numbers: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    for i in range(low, high):
        out[i] = np.float32(1.0) / numbers[i]


@parallel()
def take_room(low: int, high: int, rooms: NDArray[np.int64], out: NDArray[np.int64]) -> None:
    for i in range(low, high):
        room = np.empty(rooms[i], np.int64)
        room[0] = i
        out[i] = room[0]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 1001])
def test_every_step_is_taken_once(count: int, threads: int) -> None:
    if threads > numba.config.NUMBA_NUM_THREADS:
        pytest.skip("one thread here")
    before = numba.get_num_threads()
    numba.set_num_threads(threads)
    try:
        seen, by = np.zeros(count + 5, np.int64), np.full(count + 5, -1)
        count_steps(count, seen, by)
    finally:
        numba.set_num_threads(before)
    assert seen.tolist() == [1] * count + [0] * 5
    assert set(by[:count].tolist()) <= {count * share // threads for share in range(threads)}


@pytest.mark.parametrize("order", ["rows", "columns", "every second"])
def test_arguments_arrive_as_they_were_given(order: str) -> None:
    numbers = np.random.default_rng(0).standard_normal((9, 6))
    matrix = {"rows": numbers, "columns": np.asfortranarray(numbers), "every second": numbers[::2, 1:]}[order]
    for negate in (False, True):
        out = np.zeros(matrix.shape)
        mix(len(matrix), matrix, 2.5, -3, negate, out)
        expected = matrix * 2.5 - 3
        np.testing.assert_array_equal(out, -expected if negate else expected)


def test_arguments_may_be_named_and_the_loop_is_documented() -> None:
    seen, by = np.zeros(3, np.int64), np.zeros(3, np.int64)
    count_steps(count=3, by=by, seen=seen)
    assert seen.tolist() == [1, 1, 1]
    assert count_steps.__name__ == "count_steps" and "One more" in count_steps.__doc__


def test_division_by_zero_is_no_error() -> None:
    out = np.zeros(3, np.float32)
    divide(3, np.array([2.0, 0.0, -0.0], np.float32), out)
    assert out.tolist() == [0.5, np.inf, -np.inf]


@pytest.mark.parametrize("at", [0, 3])
def test_no_memory_in_any_share_is_told(at: int) -> None:
    rooms, out = np.full(4, 8), np.full(4, -1)
    take_room(4, rooms, out)
    assert out.tolist() == [0, 1, 2, 3]
    rooms[at] = 2**59
    with pytest.raises(MemoryError):
        take_room(4, rooms, out)


def test_references_to_arguments_are_neither_lost_nor_kept() -> None:
    seen, by = np.zeros(64, np.int64), np.zeros(64, np.int64)
    before = sys.getrefcount(seen)
    for _ in range(50):
        count_steps(64, seen, by)
    assert sys.getrefcount(seen) == before
    assert seen.tolist() == [50] * 64


LOOPS = """
from quantkit.maths.parallel import parallel

@parallel()
def first(low, high, out):
    for i in range(low, high):
        out[i] = ADDED

@parallel()
def second(low, high, out):
    for i in range(low, high):
        out[i] = -ADDED
"""
USE = """
import numpy as np
from loops_of_a_test import first, second
out = np.zeros((2, 5), np.int64)
first(5, out[0])
second(5, out[1])
print(sum(first.stats.cache_hits.values()), sum(second.stats.cache_hits.values()), *out[:, 4])
"""
HELD = (
    USE
    + """
first(5, out[1])
(kept,) = first.overloads.values()
print(kept.library._shared_module, out[1, 4])
"""
)


def test_the_next_process_finds_the_code_until_its_file_changes(tmp_path: Path) -> None:
    """Two loops of one file whose outer functions have the same bytes: each finds its own."""
    file = tmp_path / "loops_of_a_test.py"
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}

    def run(text: str = USE) -> str:
        done = subprocess.run(
            [sys.executable, "-c", text], env=environment, capture_output=True, text=True, check=True, timeout=300
        )
        return done.stdout.strip()

    file.write_text(LOOPS.replace("ADDED", "7"))
    assert [run(), run()] == ["0 0 7 -7", "1 1 7 -7"]
    file.write_text(LOOPS.replace("ADDED", "18"))  # of another length, whatever the clock says
    assert [run(), run()] == ["0 0 18 -18", "1 1 18 -18"]
    assert run(HELD).splitlines()[-1] == "None 18", "code from the cache is not held in a second form to be linked in"
    helper_changed = "import quantkit.maths.parallel as p; p.SOURCE += 1\n" + USE
    assert [run(helper_changed), run(helper_changed), run()] == ["0 0 18 -18", "1 1 18 -18", "1 1 18 -18"]


SHARES = """
import numba, numpy as np
from quantkit.maths.gram_kernels import add_scaled

assert numba.config.NUMBA_NUM_THREADS == 4
for rows in range(8):
    gram, ones = np.zeros((rows, 3), np.float32), np.ones(max(rows, 3), np.float32)
    for turn in range(50):
        add_scaled(rows, np.ones((rows, 3), np.int32), ones[:rows], ones[:3], gram, False)
    assert (gram == 50).all(), (rows, gram)
print(numba.threading_layer())
"""


@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_every_layer_of_numba_takes_every_step_once(layer: str) -> None:
    """A scheduler may call for several shares at once, or for none; numba takes what a machine has."""
    environment = {**os.environ, "NUMBA_NUM_THREADS": "4", "NUMBA_THREADING_LAYER": layer}
    done = subprocess.run([sys.executable, "-c", SHARES], env=environment, capture_output=True, text=True, timeout=300)
    if "No threading layer could be loaded" in done.stderr:
        pytest.skip(f"numba has no {layer} here")
    assert (done.returncode, done.stdout.strip()) == (0, layer), done.stderr[-2000:]


def test_a_body_with_variables_around_it_is_refused() -> None:
    """Two of them would be of one line and name, and one would be taken for the other."""
    added = 3

    def body(low: int, high: int, out: NDArray[np.int64]) -> None:
        for i in range(low, high):
            out[i] = added

    with pytest.raises(TypeError, match="cannot tell the variables around it apart"):
        parallel()(body)


def test_bodies_run_without_the_compiler_where_that_is_told() -> None:
    text = "import numpy as np; from quantkit.maths.order_kernel import pick; m = np.arange(6.0).reshape(2, 3); "
    text += "out = np.empty((2, 2)); pick(2, m, np.array([1, 0]), np.array([2, 0]), out); print(out.tolist())"
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[[5.0, 3.0], [2.0, 0.0]]", done.stderr[-2000:]


def test_other_threads_of_python_go_on_meanwhile() -> None:
    ticks, over = [0], threading.Event()

    def tick() -> None:
        while not over.is_set():
            ticks[0] += 1
            time.sleep(0)  # lets the other thread have its turn, which is not taken from it below

    numbers = np.ones(1 << 25, np.float32)
    out = np.zeros_like(numbers)
    divide(2, numbers, out)  # compiled
    thread, interval = threading.Thread(target=tick), sys.getswitchinterval()
    sys.setswitchinterval(1000)  # a thread that waits for its turn asks for it only then
    try:
        thread.start()
        before = ticks[0]
        divide(len(numbers), numbers, out)
        during = ticks[0] - before
    finally:
        sys.setswitchinterval(interval)
        over.set()
        thread.join()
    assert during > 0
