from __future__ import annotations

import errno
import gc
import itertools
import mmap
import random
import resource
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantkit import arena
from quantkit.arena import SMALLEST_BYTES, Arena, Segment, converted, empty, empty_on, packed
from quantkit.environment import rss_bytes

PAGE = mmap.PAGESIZE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere tensors come from torch")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[Arena]:
    """An arena of 64 MiB in the place of the process's own."""
    made = Arena(64 << 20)
    monkeypatch.setattr(arena, "_ARENA", made)
    yield made


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int32, torch.uint8])
def test_a_tensor_is_a_plain_one(fresh: Arena, dtype: torch.dtype) -> None:
    tensor = empty((3, 300, 401), dtype)
    assert tensor.shape == (3, 300, 401)
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    assert not tensor._is_view()
    assert tensor.untyped_storage().nbytes() == 3 * 300 * 401 * dtype.itemsize
    assert _address(tensor) % PAGE == 0
    values = torch.arange(tensor.numel()).remainder(100).view(tensor.shape).to(dtype)
    tensor.copy_(values)
    assert torch.equal(tensor, values)


def test_small_tensors_are_left_to_the_c_library(fresh: Arena) -> None:
    empty((SMALLEST_BYTES // 4 - 1,))
    assert not fresh._segments
    empty((SMALLEST_BYTES // 4,))
    assert len(fresh._segments) == 1


def test_what_is_larger_than_a_segment_is_left_to_it(fresh: Arena) -> None:
    kept = empty((1 << 18,))
    assert len(fresh._segments) == 1
    assert empty((20 << 20,)).numel() == 20 << 20
    assert len(fresh._segments) == 1
    del kept


def test_what_is_free_counts_as_long_as_it_has_its_pages(fresh: Arena) -> None:
    assert arena.free_bytes() == 0
    first, second, third = (empty((1 << 20,), torch.uint8) for _ in range(3))
    assert arena.free_bytes() == 0, "what was never lent has none"
    del second
    assert arena.free_bytes() == 1 << 20
    arena.give_back()
    assert arena.free_bytes() == 0
    for _ in range(3):  # in the place of pages that went back, and then in its own
        second = empty((1 << 19,), torch.uint8)
        assert arena.free_bytes() == 0
        del second
        assert arena.free_bytes() == 1 << 19
    del third
    assert arena.free_bytes() == 3 << 19
    del first


def test_what_lies_where_no_pages_are_takes_those_of_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "SPARE_BYTES", 0)
    segment, megabyte = Segment(64 << 20), 1 << 20
    sizes = [8 * megabyte, megabyte] * 3
    pieces = [segment.take(size) for size in sizes]
    for piece in pieces:
        np.frombuffer(piece, np.uint8)[:] = 1
    del piece
    before = rss_bytes()
    pieces[::2] = [None] * 3  # three holes of 8 MB, between pieces of one
    segment._join_gone()
    assert segment.free_bytes() == 24 * megabyte and before - rss_bytes() < megabyte
    large = segment.take(20 * megabyte)  # no hole is so large
    np.frombuffer(large, np.uint8)[:] = 2
    assert abs(rss_bytes() - before) < megabyte, "as much as was ever lent at once"
    assert segment.free_bytes() == 4 * megabyte
    assert [np.frombuffer(piece, np.uint8).min() for piece in pieces[1::2]] == [1, 1, 1]
    small = segment.take(4 * megabyte)
    assert segment.free_bytes() == 0, "the lowest hole is the last to lose its pages"
    assert not (np.frombuffer(small, np.uint8) - 1).any()


@pytest.mark.parametrize(("more", "left"), [(0, 0), (3 << 20, 2 << 20), (None, 4 << 20)])
def test_pages_of_holes_are_taken_once_no_others_may_come(more: int | None, left: int, fresh: Arena) -> None:
    low, between, high = (empty((size << 20,), torch.uint8) for size in (4, 1, 8))
    del high
    arena.give_back()
    del low
    arena.allow(more)
    large = empty((3 << 20,), torch.uint8)  # in the lowest hole, which has pages
    assert arena.free_bytes() == 1 << 20
    del large
    large = empty((5 << 20,), torch.uint8)  # behind the other piece, where it takes five pages of a megabyte
    assert arena.free_bytes() == left
    assert large.nbytes + between.nbytes == 6 << 20, "what is lent has its own, whatever is allowed"


def test_holes_keep_no_more_pages_under_a_limit_than_without_one(fresh: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "SPARE_BYTES", 1 << 20)
    for more in (None, 1 << 40):
        low, between, high = (empty((size << 20,), torch.uint8) for size in (4, 1, 8))
        del high
        arena.give_back()
        del low
        arena.allow(more)
        large = empty((12 << 20,), torch.uint8)  # 13 MB are lent, as many as ever
        assert arena.free_bytes() == 1 << 20
        del large, between
        arena.give_back()


def test_what_is_kept_is_counted_over_all_segments() -> None:
    made = Arena(4 << 20)
    pieces = [made.take(3 << 20) for _ in range(3)]
    pieces.clear()
    assert made.free_bytes() == 9 << 20
    made.give_back(keep=5 << 20)
    assert [segment.free_bytes() >> 20 for segment in made._segments] == [3, 2, 0]
    made.allow(6 << 20)
    assert [segment.at_most for segment in made._segments] == [5 << 20, 4 << 20, 2 << 20], "each has its share"
    held = [made.take(3 << 20) for _ in range(4)]
    assert len(held) == len(made._segments) and made._segments[-1].at_most == 0, "one that comes later has none"
    made.allow(None)
    assert {segment.at_most for segment in made._segments} == {None}


@pytest.mark.parametrize("step", ["_make_room", "_lend"])
def test_a_piece_that_was_lost_to_an_interrupt_hides_nothing(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    segment = Segment(64 * mmap.PAGESIZE)
    low = segment.take(8 * mmap.PAGESIZE)
    np.frombuffer(low, np.uint8)[:] = 1

    def interrupt(*_: object) -> None:
        raise _Interrupt

    with monkeypatch.context() as patched, pytest.raises(_Interrupt):
        patched.setattr(segment, step, interrupt)
        segment.take(4 * mmap.PAGESIZE)
    high = segment.take(4 * mmap.PAGESIZE)
    np.frombuffer(high, np.uint8)[:] = 2
    del low
    segment.give_back()
    assert segment.free_bytes() == 0 and (np.frombuffer(high, np.uint8) == 2).all()


def test_some_of_what_is_free_may_be_kept(fresh: Arena) -> None:
    kept = [empty((1 << 20,), torch.uint8).fill_(1) for _ in range(4)]
    del kept[1:3]
    arena.give_back(keep=3 << 19)
    assert arena.free_bytes() == 3 << 19
    arena.give_back(keep=4 << 20)
    assert arena.free_bytes() == 3 << 19
    arena.give_back(keep=1)
    assert arena.free_bytes() == 0, "whole pages"
    assert all((one == 1).all() for one in kept)


@pytest.mark.parametrize("at_most", [None, 0, 300 * mmap.PAGESIZE])
@pytest.mark.parametrize("seed", range(3))
def test_accounts_of_free_pieces_and_pages_hold(
    seed: int, at_most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena, "SPARE_BYTES", 4 * mmap.PAGESIZE)
    segment, chance, lent = Segment(400 * mmap.PAGESIZE, at_most), random.Random(seed), []
    for step in range(2000):
        what = chance.random()
        if what < 0.5:
            size = chance.choice((1, 2, 3, 7, 20)) * mmap.PAGESIZE - chance.choice((0, 1, 100))
            piece = segment.take(size)
            if piece is not None:
                own = np.frombuffer(piece, np.uint8)
                own[:] = step % 251
                lent.append((own, step % 251))
                del own
            del piece
        elif what < 0.97 and lent:
            own, number = lent.pop(chance.randrange(len(lent)))
            assert (own == number).all()
            del own
        elif what > 0.995:
            keep = chance.choice((0, 9)) * mmap.PAGESIZE
            there = segment.free_bytes()
            segment.give_back(keep)
            assert segment.free_bytes() == min(keep, there)
        segment._join_gone()
        for pieces in (segment._free, segment._bare):
            assert all(low < high for low, high in pieces)
            assert all(one[1] <= other[0] for one, other in itertools.pairwise(pieces))
        assert all(any(low <= start and end <= high for low, high in segment._free) for start, end in segment._bare)
        have = segment._with_pages()
        assert sum(end - start for start, end in have) == segment.free_bytes()
        assert not any(low < end and start < high for low, high in segment._bare for start, end in have)
    assert len(lent) > 3


def test_copies_are_made_only_where_they_are_needed(fresh: Arena) -> None:
    whole = torch.arange(1 << 18, dtype=torch.float32).view(512, 512)
    assert packed(whole) is whole
    assert not fresh._segments
    turned = packed(whole.T)
    assert torch.equal(turned, whole.T)
    assert turned.is_contiguous()
    cpu = torch.device("cpu")
    assert converted(whole, cpu, torch.float32) is whole
    half = converted(whole, cpu, torch.bfloat16)
    assert torch.equal(half, whole.to(torch.bfloat16))
    assert fresh._segments, "copies lie in the arena"
    assert converted(whole, torch.device("meta"), torch.float32).is_meta


def test_where_a_tensor_lies_on_another_device_is_for_torch_to_tell() -> None:
    class OnGpu:
        device, dtype = torch.device("cuda", 0), torch.float32

        def to(self, device: torch.device, dtype: torch.dtype) -> OnGpu:
            assert (device, dtype) == (torch.device("cuda"), torch.float32) != (self.device, self.dtype)
            return self

    there: Any = OnGpu()
    assert converted(there, torch.device("cuda"), torch.float32) is there


def test_a_tensor_on_another_device_is_torchs(fresh: Arena) -> None:
    assert empty_on(torch.device("meta"), (1 << 20,)).is_meta
    assert not fresh._segments


def test_bytes_are_free_once_nothing_looks_at_them(fresh: Arena) -> None:
    first = empty((1 << 18,))
    where = _address(first)
    row, numbers = first[5:7], first.numpy()
    del first
    assert _address(other := empty((1 << 18,))) != where, "a view looks at them"
    del row, other
    assert _address(other := empty((1 << 18,))) != where, "an array looks at them"
    del numbers, other
    assert _address(empty((1 << 18,))) == where


def test_an_emptied_tensor_lets_go_of_its_bytes(fresh: Arena) -> None:
    with torch.inference_mode():
        held = empty((1 << 18,))
        where = _address(held)
        held.set_()  # type: ignore[call-overload]
        assert _address(empty((1 << 18,))) == where


def test_what_is_in_a_circle_is_free_once_it_is_collected(fresh: Arena) -> None:
    circle: list[object] = [empty((1 << 18,))]
    where = _address(circle[0])  # type: ignore[arg-type]
    circle.append(circle)
    del circle
    gc.collect()
    assert _address(empty((1 << 18,))) == where


def test_free_neighbours_are_one_piece(fresh: Arena) -> None:
    pieces = [empty((1 << 18,)) for _ in range(4)]
    where = _address(pieces[0])
    guard = empty((1 << 18,))
    for at in (1, 3, 0, 2):  # alone, alone, before a free one, between two
        pieces[at] = torch.empty(0)
    assert _address(empty((4 << 18,))) == where
    del guard


def test_no_two_tensors_share_bytes(fresh: Arena) -> None:
    chance = random.Random(0)
    held: list[tuple[int, torch.Tensor]] = []
    for step in range(2000):
        if held and chance.random() < 0.5:
            number, tensor = held.pop(chance.randrange(len(held)))
            assert (tensor == number).all()
        else:
            tensor = empty((chance.randrange(1 << 17, 1 << 20),), torch.uint8).fill_(step % 251)
            held.append((step % 251, tensor))
    spans = sorted((_address(tensor), tensor.numel()) for _, tensor in held)
    assert all(start + size <= behind for (start, size), (behind, _) in zip(spans, spans[1:], strict=False))
    held.clear()
    del tensor
    assert len(fresh._segments) == 1
    segment = fresh._segments[0]
    segment.give_back()
    assert segment._free == [(0, 64 << 20)] and not segment._lent


def test_another_segment_takes_what_the_first_has_no_room_for(fresh: Arena) -> None:
    held = [empty((12 << 20,), torch.uint8) for _ in range(6)]  # five to a segment
    assert len(fresh._segments) == 2
    assert len({_address(tensor) for tensor in held}) == 6


def test_where_no_addresses_are_lent_tensors_come_from_torch(fresh: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refused)
    assert empty((1 << 18,)).fill_(1.0).sum() == 1 << 18


def test_pages_of_what_is_free_go_back(fresh: Arena) -> None:
    kept = empty((1 << 20,)).fill_(7.0)
    free = empty((8 << 20,), torch.uint8).fill_(1)
    behind = empty((1 << 20,)).fill_(8.0)
    before = rss_bytes()
    del free
    assert before - rss_bytes() < 1 << 20, "pages stay for what comes next"
    arena.give_back()
    assert before - rss_bytes() > 7 << 20
    assert (kept == 7.0).all()
    assert (behind == 8.0).all()
    assert not empty((8 << 20,), torch.uint8).any(), "pages that come again are empty"


def test_threads_take_turns(fresh: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most = [0], [0]
    take = Segment.take

    def slow(self: Segment, size: int) -> memoryview | None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.01)  # the others come here meanwhile
        found = take(self, size)
        inside[0] -= 1
        return found

    monkeypatch.setattr(Segment, "take", slow)
    threads = [threading.Thread(target=empty, args=((1 << 18,),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


class _Interrupt(Exception):
    pass


@pytest.mark.parametrize("more", [None, 0])
def test_an_interrupt_at_any_time_loses_a_piece_at_most(
    more: int | None, fresh: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena, "SPARE_BYTES", 0)
    fresh.allow(more)

    def interrupted(*_: object) -> None:
        raise _Interrupt

    before = signal.signal(signal.SIGALRM, interrupted)
    held: list[tuple[int, torch.Tensor]] = []
    chance = random.Random(0)
    came = 0
    try:
        while came < 300:
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.0001, 0.0005))
                while True:
                    made = empty((chance.randrange(1 << 17, 1 << 19),), torch.uint8)
                    if len(held) == 8:
                        held.pop(chance.randrange(8))
                    held.append((0, made))
                    if chance.random() < 0.1:
                        arena.give_back(keep=chance.randrange(1 << 20))
            except _Interrupt:
                came += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            held = [(number, tensor.fill_(number)) for number, (_, tensor) in enumerate(held, 1)]
            arena.give_back()
            assert all((tensor == number).all() for number, tensor in held), "two have the same bytes"
            for segment in fresh._segments:
                ends = [end for _, end in segment._free]
                assert all(end < start for end, (start, _) in zip(ends, segment._free[1:], strict=False))
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("step", ["piece", "_lent"])
def test_an_interrupt_while_a_piece_is_lent_loses_that_one(
    step: str, fresh: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = empty((1 << 17,)).fill_(3.0)
    segment = fresh._segments[0]

    class Interrupting(dict[int, object]):
        def __setitem__(self, *_: object) -> None:
            raise _Interrupt

    def interrupt(self: object, *_: object) -> None:
        raise _Interrupt

    with monkeypatch.context() as patched, pytest.raises(_Interrupt):
        if step == "piece":
            patched.setattr(arena._Lent, "__setattr__", interrupt, raising=False)
        else:
            patched.setattr(segment, "_lent", Interrupting(segment._lent))
        empty((1 << 17,))
    made = [empty((1 << 17,)).fill_(number) for number in range(8)]
    assert (kept == 3.0).all()
    assert all((tensor == number).all() for number, tensor in enumerate(made))


@pytest.mark.parametrize(
    ("system", "limit", "overcommit", "there"),
    [
        ("linux", resource.RLIM_INFINITY, "0", True),
        ("linux", resource.RLIM_INFINITY, "1", True),
        ("linux", resource.RLIM_INFINITY, None, True),
        ("linux", resource.RLIM_INFINITY, "2", False),
        ("linux", 8 << 30, "0", False),
        ("darwin", resource.RLIM_INFINITY, "0", False),
    ],
)
def test_there_is_none_where_addresses_count_as_memory(
    system: str, limit: int, overcommit: str | None, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if overcommit is not None:
        (tmp_path / "overcommit").write_text(f"{overcommit}\n")
    monkeypatch.setattr(arena, "OVERCOMMIT", tmp_path / "overcommit")
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    assert (arena._arena() is not None) == there


def test_without_one_tensors_come_from_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "_ARENA", None)
    arena.give_back()
    assert arena.free_bytes() == 0
    assert empty((1 << 18,)).fill_(2.0).sum() == 2 << 18


def test_an_arena_goes_when_nothing_is_left_of_it() -> None:
    made = Arena(1 << 20)
    lent = made.take(1 << 18)
    watched = weakref.ref(made)
    del made
    gc.collect()
    assert watched() is None
    assert lent is not None
    lent[0] = 1  # its bytes stay as long as they are looked at
