from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from quantkit import arena, memory
from quantkit.environment import rss_bytes
from quantkit.errors import UsageError
from quantkit.memory import FreedMemory, MemoryLimit, memory_limit, parse_bytes, room_within, trim


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3GB", 3 * 10**9),
        ("1.5 gb", 15 * 10**8),
        ("512MiB", 2**29),
        ("2TB", 2 * 10**12),
        ("1 TiB", 2**40),
        ("100000", 100000),
        (" 7kb ", 7000),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "3 apples", "-1GB", "3TBB", "GB"])
def test_what_is_no_size_is_said(text: str) -> None:
    with pytest.raises(UsageError, match="--max-memory: found"):
        memory_limit(text)


def test_room_is_what_the_limit_leaves() -> None:
    cpu = torch.device("cpu")
    assert MemoryLimit(1).room_bytes(cpu) == 0
    left = room_within(10**12, 0)
    assert left - 10**11 < MemoryLimit(10**12).room_bytes(cpu) < left < 10**12
    assert memory_limit(None).room_bytes(cpu) > 0


def test_room_on_a_gpu_counts_what_torch_keeps_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 4000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 2000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 500)
    assert MemoryLimit(1).room_bytes(torch.device("cuda")) == (1000 + 2000 - 500) // 2


def test_freed_memory_goes_back_before_a_new_peak_and_as_often_as_its_cost_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, given_back = 100.0, []

    def costly() -> float:
        given_back.append(now)
        return 0.15

    monkeypatch.setattr(memory, "trim", costly)
    monkeypatch.setattr(arena, "free_bytes", lambda: 0)
    monkeypatch.setattr(memory, "rss_bytes", lambda: 700)
    monkeypatch.setattr(memory, "peak_rss_bytes", lambda: 1000)
    monkeypatch.setattr(memory.time, "perf_counter", lambda: now)
    sparing = FreedMemory()
    sparing.give_back(0)
    sparing.give_back(300)
    assert given_back == [], "no more than there was"
    for seconds in (100.0, 100.1, 107.4, 107.6, 115.0, 115.2):
        now = seconds
        sparing.give_back(301)
    assert given_back == [100.0, 107.6, 115.2], "0.15 s are a fiftieth of 7.5"


@pytest.mark.parametrize(
    ("coming", "trimmed"),
    [
        (0, False),  # 6000 of 6300
        (700, False),  # of which 400 are there
        (701, True),
    ],
)
def test_under_a_limit_the_heap_goes_back_where_the_process_comes_near_to_it(
    coming: int, trimmed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = process(monkeypatch, held=6000, free=400, heap=0)
    FreedMemory(6400).give_back(coming)
    expected = {"held": 6000, "free": 400, "trimmed": trimmed, "allowed": 300}
    assert told == expected, "what is free in the arena serves for what comes, and it may grow as far as 6300"


def test_what_others_ask_for_is_not_served_by_the_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    told = process(monkeypatch, held=6000, free=400, heap=0)
    FreedMemory(6400).give_back(100, beside=500)
    assert told == {"held": 5800, "free": 200, "trimmed": True, "allowed": 0}


@pytest.mark.parametrize(
    ("coming", "heap", "free"),
    [
        (0, 0, 300),  # 6400 are 100 more than 6300
        (0, 40, 340),
        (0, 100, 400),
        (350, 0, 350),  # no more than is not asked for
        (500, 0, 400),
    ],
)
def test_under_a_limit_pages_of_the_arena_go_only_as_far_as_they_have_to(
    coming: int, heap: int, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = process(monkeypatch, held=6400, free=400, heap=heap)
    FreedMemory(6400).give_back(coming)
    held = 6400 - heap - (400 - free)
    assert told == {"held": held, "free": free, "trimmed": True, "allowed": max(0, 6300 - held)}


def process(monkeypatch: pytest.MonkeyPatch, *, held: int, free: int, heap: int) -> dict[str, int]:
    """Lets `memory` see a process: so many bytes that it holds, of which so many are free in the arena and so many in
    the heap. What is returned follows what is given back."""
    told = {"held": held, "free": free, "trimmed": False}

    def trim_heap() -> None:
        told.update(held=told["held"] - (0 if told["trimmed"] else heap), trimmed=True)

    def give_back(keep: int = 0) -> None:
        gone = max(0, told["free"] - keep)
        told.update(held=told["held"] - gone, free=told["free"] - gone)

    monkeypatch.setattr(memory, "_trim_heap", trim_heap)
    monkeypatch.setattr(memory, "rss_bytes", lambda: told["held"])
    monkeypatch.setattr(arena, "free_bytes", lambda: told["free"])
    monkeypatch.setattr(arena, "give_back", give_back)
    monkeypatch.setattr(arena, "allow", lambda more: told.update(allowed=more))
    return told


def test_room_under_a_limit_leaves_some_for_small_pieces_and_for_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert room_within(6400, 5900) == 300
    assert room_within(6400, 6300) == room_within(6400, 9999) == 0
    monkeypatch.setattr(memory, "rss_bytes", lambda: 6300)
    monkeypatch.setattr(arena, "free_bytes", lambda: 400)
    assert MemoryLimit(6400).room_bytes(torch.device("cpu")) == 300, "what is free in the arena is room"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what is freed so")
def test_what_is_given_back_is_resident_no_more() -> None:
    trim()
    before = rss_bytes()
    pieces = [bytearray(b"x" * 65536) for _ in range(1000)]  # each too small to be mapped by itself
    del pieces[:-1]  # the last one stands above those that were freed
    cost = trim()
    assert rss_bytes() < before + 20e6
    assert cost > 60e6 / 4096 * memory.PAGE_S


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what is freed so")
@pytest.mark.parametrize(("told", "stays"), [("keep_freed_memory", True), ("map_large_memory", False)])
def test_large_blocks_of_the_c_library_stay_or_go_back_at_once(told: str, stays: bool) -> None:
    """In a process of its own: what the C library is told holds for all that comes behind."""
    code = f"""
import torch
from quantkit.environment import rss_bytes
from quantkit.memory import {told}
{told}()
blocks = [torch.ones(300_000) for _ in range(80)]  # 1.2 MB each
last, before = torch.ones(1000), rss_bytes()
del blocks
print(before - rss_bytes())
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (int(found.stdout) < 8e6) is stays
