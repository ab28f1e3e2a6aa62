"""Memory for what compiled loops write, whose pages stay while what lies in it comes and goes.

Batches ask for the same few sizes over and over. The C library gives pieces of that size back to the system, which
takes longer to lend pages again than most loops take to fill them, or it keeps them in the heap that all else lies in,
where small things between them make it grow. Here a piece goes to the lowest addresses that are free, and neighbours
that are free are one.
"""

from __future__ import annotations

import math
import mmap
import resource
import sys
import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SMALLEST_BYTES = 128 << 10
"""Of a tensor that is worth a place here; the C library does well with smaller ones."""

SEGMENT_BYTES = 1 << 30
"""Addresses that are asked for at once; those that were never written to take no memory."""

SPARE_BYTES = 16 << 20
"""Of pages that are kept in holes beyond what was ever lent at once, so that they need not come anew: without them two
in a hundred of the time of SmolLM2's run for two in a hundred of its memory."""

OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
"""Of Linux: 2 where addresses are lent against memory that there is."""


class _Lent(weakref.ref):
    """What is lent: its owner, and the piece of addresses that is free once that is gone."""

    piece: tuple[int, int] | None = None


class Segment:
    """A stretch of addresses, and what of it is free. Raises OSError when the system lends none.

    It holds hardly more pages than were ever lent at once: what has to lie where there are none takes those of pieces
    that are free. at_most: beyond how many bytes of pages it does, where these are fewer than SPARE_BYTES beyond that.

    An interrupt may come between any two steps. So what is free changes in one: at worst a piece is never lent again.
    """

    def __init__(self, size: int, at_most: int | None = None):
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._size, self._most = size, 0  # the most bytes that were lent at once
        self.at_most = at_most
        self._free = [(0, size)]  # in order, no two of them neighbours
        self._bare = [(0, size)]  # in order, what of that has no pages
        self._lent: dict[int, _Lent] = {}
        self._gone: deque[_Lent] = deque()

    def take(self, size: int) -> memoryview | None:
        """The first free bytes, so many, which are free again once nothing looks at them; None where there are none."""
        length = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._join_gone()
        for place, (start, end) in enumerate(self._free):
            if end - start >= length:
                before = self._pages()
                # first: were it free no more and bare still, pages behind it would be taken for free ones
                self._bare = _outside(self._bare, start, start + length)
                self._free[place : place + 1] = [(start + length, end)] if end - start > length else []
                self._make_room(before)
                return self._lend(start, size, start + length)
        return None

    def _make_room(self, before: int) -> None:
        """Let pages of holes go in the place of those that come to what is lent now. before: bytes of pages so far."""
        lent = self._size - _length(self._free)
        self._most = max(self._most, lent)
        if self._pages() > before:
            at_most = self._most + SPARE_BYTES
            if self.at_most is not None:
                at_most = min(at_most, max(self.at_most, before))
            self._take_pages(self._pages() - max(lent, at_most))

    def allow(self, more: int | None) -> None:
        """How many bytes of pages it may have beyond those that it has; None as many as SPARE_BYTES say."""
        self.at_most = None if more is None else self._pages() + more

    def _pages(self) -> int:
        return self._size - _length(self._bare)

    def _take_pages(self, size: int) -> None:
        """Let the system have so many bytes of what is free, from the last ones on, which are the last to be lent."""
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        for low, high in reversed(self._with_pages() if size > 0 else []):
            start = max(low, high - size)
            with suppress(OSError):  # locked in memory
                self._map.madvise(mmap.MADV_DONTNEED, start, high - start)
                _put(self._bare, start, high)
            size -= high - start
            if size <= 0:
                break

    def _with_pages(self) -> list[tuple[int, int]]:
        """What is free and has pages."""
        parts, bare = [], iter([*self._bare, (self._size, self._size)])
        low, high = next(bare)
        for start, end in self._free:
            while high <= end and low < self._size:
                parts.append((start, low))
                start = max(start, high)
                low, high = next(bare)
            parts.append((start, end))
        return [part for part in parts if part[0] < part[1]]

    def _lend(self, start: int, size: int, end: int) -> memoryview:
        owner: NDArray[np.uint8] = np.ndarray(size, np.uint8, self._map, start)
        # not a function of Python's: the garbage collector may call it anywhere, and an interrupt in it would be lost
        lent = _Lent(owner, self._gone.append)
        lent.piece = (start, end)
        self._lent[start] = lent
        return owner.data

    def _join_gone(self) -> None:
        """Make pieces that nothing looks at any more free, one with free neighbours."""
        while self._gone:
            piece = self._gone.popleft().piece
            if piece is None:
                continue  # an interrupt came before it was known
            start, end = piece
            self._lent.pop(start, None)
            _put(self._free, start, end)

    def free_bytes(self) -> int:
        """Of what is free, what has pages."""
        self._join_gone()
        return _length(self._free) - _length(self._bare)

    def give_back(self, keep: int = 0) -> None:
        """Let the system have the pages of what is free, but for so many bytes."""
        self._take_pages(self.free_bytes() - keep)


def _outside(pieces: Sequence[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """What of pieces of addresses, in order, lies before `start` or from `end` on."""
    parts = [part for low, high in pieces for part in ((low, min(high, start)), (max(low, end), high))]
    return [part for part in parts if part[0] < part[1]]


def _length(pieces: Sequence[tuple[int, int]]) -> int:
    return sum(end - start for start, end in pieces)


def _put(pieces: list[tuple[int, int]], start: int, end: int) -> None:
    """Add a piece of addresses to others in order, one with its neighbours, in one step."""
    first = last = bisect_left(pieces, (start, end))
    if last < len(pieces) and pieces[last][0] == end:
        end, last = pieces[last][1], last + 1
    if first and pieces[first - 1][1] == start:
        start, first = pieces[first - 1][0], first - 1
    pieces[first:last] = [(start, end)]


class Arena:
    """As many segments as it takes. segment_bytes: of each; so many and more are not lent."""

    def __init__(self, segment_bytes: int = SEGMENT_BYTES):
        self.segment_bytes = segment_bytes
        self._at_most: int | None = None
        self._segments: list[Segment] = []
        self._lock = Lock()

    def take(self, size: int) -> memoryview | None:
        """So many bytes, free again once nothing looks at them; None of too many, and where the system lends none."""
        if size >= self.segment_bytes:
            return None
        with self._lock:
            for segment in self._segments:
                if (found := segment.take(size)) is not None:
                    return found
            try:
                self._segments.append(Segment(self.segment_bytes, self._at_most))
            except OSError:
                return None
            return self._segments[-1].take(size)

    def allow(self, more: int | None) -> None:
        """How many bytes of pages it may have beyond those that it has now, before it takes those of holes."""
        with self._lock:
            self._at_most = None if more is None else 0  # of segments that come later
            for segment in self._segments:
                segment.allow(None if more is None else more // len(self._segments))

    def free_bytes(self) -> int:
        """Of what is free, what has pages."""
        with self._lock:
            return sum(segment.free_bytes() for segment in self._segments)

    def give_back(self, keep: int = 0) -> None:
        """Let the system have the pages of what is free, but for so many bytes."""
        with self._lock:
            for segment in self._segments:
                held = segment.free_bytes()
                segment.give_back(keep)
                keep = max(0, keep - held)


def _arena() -> Arena | None:
    """None where addresses count as memory that is held: under `ulimit -v`, where the kernel lends no more than it has,
    and on systems other than Linux."""
    if sys.platform != "linux" or resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return None
    with suppress(OSError):
        if OVERCOMMIT.read_text().strip() == "2":
            return None
    return Arena()


_ARENA = _arena()


def empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor on the CPU that holds anything, in one piece, as compiled loops write to. What may run on another device
    takes `empty_on`."""
    return _empty(shape, dtype)


def empty_on(device: torch.device, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """The same on any device; torch has an arena of its own on others than the CPU."""
    return _empty(shape, dtype, device=device)


def packed(tensor: Tensor) -> Tensor:
    """The tensor in one piece: itself where it is, else a copy."""
    return tensor if tensor.is_contiguous() else empty_on(tensor.device, tensor.shape, tensor.dtype).copy_(tensor)


def converted(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The tensor on a device and in a dtype: itself where it is, else a copy."""
    if tensor.dtype == dtype or {tensor.device.type, device.type} != {"cpu"}:
        return tensor.to(device, dtype)  # which knows that "cuda" may be "cuda:0"
    return empty(tensor.shape, dtype).copy_(tensor)


def _empty(shape: Sequence[int], dtype: torch.dtype, **where: Any) -> Tensor:
    """where: the device, unless it is torch's own choice, which is the CPU."""
    size = math.prod(shape) * dtype.itemsize
    if _ARENA is not None and size >= SMALLEST_BYTES and ("device" not in where or where["device"].type == "cpu"):
        lent = _ARENA.take(size)
        if lent is not None:
            # resized: a reshaped tensor would be a view of another one
            return torch.frombuffer(lent, dtype=dtype).resize_(tuple(shape))
    return torch.empty(tuple(shape), dtype=dtype, **where)


def allow(more: int | None) -> None:
    """How many bytes of pages may come to those that the arena has now, before what has to lie where there are none
    takes those of holes in its segment; what is lent at once always has its own. There are never more than SPARE_BYTES
    beyond what was ever lent at once, which is all that counts where this is None. Under a limit what is held counts
    for more than the time that pages take."""
    if _ARENA is not None:
        _ARENA.allow(more)


def free_bytes() -> int:
    """Bytes of the arena that are free and have their pages."""
    return 0 if _ARENA is None else _ARENA.free_bytes()


def give_back(keep: int = 0) -> None:
    """Let the system have the pages of what is free in the arena, but for so many bytes."""
    if _ARENA is not None:
        _ARENA.give_back(keep)
