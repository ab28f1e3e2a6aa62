"""Memory for what compiled loops write, whose pages stay while what lies in it comes and goes.

Batches ask for the same few sizes over and over. The C library gives pieces of that size back to the system, which
takes longer to lend pages again than most loops take to fill them, or it keeps them in the heap that all else lies in,
where small things between them make it grow. Here a piece goes to the lowest addresses that are free, and neighbours
that are free are one.
"""

from __future__ import annotations

import math
import mmap
import sys
import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SMALLEST_BYTES = 128 << 10
"""Of a tensor that is worth a place here; the C library does well with smaller ones."""

SEGMENT_BYTES = 1 << 30
"""Addresses that are asked for at once; those that were never written to take no memory."""

CPU = torch.device("cpu")


class Segment:
    """A stretch of addresses, and what of it is free. Raises OSError when the system lends none."""

    def __init__(self, size: int):
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._starts, self._ends = [0], [size]  # of free pieces, in order
        self._touched = 0  # what lies behind was not lent since its pages were given back
        self._freed: deque[tuple[int, int]] = deque()

    def take(self, size: int) -> memoryview | None:
        """The first free bytes, so many, which are free again once nothing looks at them; None where there are none."""
        length = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._join_freed()
        for place, (start, end) in enumerate(zip(self._starts, self._ends, strict=True)):
            if end - start >= length:
                self._starts[place] += length
                if end - start == length:
                    del self._starts[place], self._ends[place]
                self._touched = max(self._touched, start + length)
                return self._lent(start, size, (start, start + length))
        return None

    def _lent(self, start: int, size: int, piece: tuple[int, int]) -> memoryview:
        owner: NDArray[np.uint8] = np.ndarray(size, np.uint8, self._map, start)
        # the garbage collector may call this anywhere, so it does no more than that
        weakref.finalize(owner, self._freed.append, piece).atexit = False
        return owner.data

    def _join_freed(self) -> None:
        """Make pieces that nothing looks at any more free, one with free neighbours."""
        while self._freed:
            start, end = self._freed.popleft()
            place = bisect_left(self._starts, start)
            if place < len(self._starts) and self._starts[place] == end:
                end = self._ends.pop(place)
                del self._starts[place]
            if place and self._ends[place - 1] == start:
                self._ends[place - 1] = end
            else:
                self._starts.insert(place, start)
                self._ends.insert(place, end)

    def give_back(self) -> None:
        """Let the system have the pages of what is free."""
        self._join_freed()
        for start, end in zip(self._starts, self._ends, strict=True):
            if start < self._touched:
                self._map.madvise(mmap.MADV_DONTNEED, start, min(end, self._touched) - start)
        if self._ends and self._ends[-1] >= self._touched:
            self._touched = min(self._touched, self._starts[-1])


class Arena:
    """As many segments as it takes. segment_bytes: of each. below: so many bytes and more are not lent, at most those
    of a segment."""

    def __init__(self, segment_bytes: int = SEGMENT_BYTES):
        self.segment_bytes = self.below = segment_bytes
        self._segments: list[Segment] = []
        self._lock = Lock()

    def take(self, size: int) -> memoryview | None:
        """So many bytes, free again once nothing looks at them; None of too many, and where the system lends none."""
        if size >= self.below:
            return None
        with self._lock:
            for segment in self._segments:
                if (found := segment.take(size)) is not None:
                    return found
            try:
                self._segments.append(Segment(self.segment_bytes))
            except OSError:
                return None
            return self._segments[-1].take(size)

    def give_back(self) -> None:
        """Let the system have the pages of what is free."""
        with self._lock:
            for segment in self._segments:
                segment.give_back()


_ARENA = Arena() if sys.platform == "linux" else None  # elsewhere free pages stay, or addresses count as memory


def empty(shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> Tensor:
    """A tensor that holds anything, in one piece: from the arena on a CPU, from torch, which has its own, elsewhere."""
    size = math.prod(shape) * dtype.itemsize
    if _ARENA is not None and device.type == "cpu" and size >= SMALLEST_BYTES:
        lent = _ARENA.take(size)
        if lent is not None:
            made = torch.empty(0, dtype=dtype)  # frombuffer's, in this shape, would be a view of another tensor
            made.set_(torch.frombuffer(lent, dtype=dtype).untyped_storage(), 0, torch.Size(shape))  # type: ignore[call-overload]
            return made
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def lend_below(size: int = SEGMENT_BYTES) -> None:
    """From now on leave tensors of so many bytes and more to the C library."""
    if _ARENA is not None:
        _ARENA.below = min(size, _ARENA.segment_bytes)


def give_back() -> None:
    """Let the system have the pages of what is free in the arena."""
    if _ARENA is not None:
        _ARENA.give_back()
