"""How much memory a run may take: the user's limit, or a share of what the machine has free; and what becomes of the
memory that was freed."""

from __future__ import annotations

import ctypes
import re
import resource
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit.environment import peak_rss_bytes, rss_bytes
from quantkit.errors import UsageError

if TYPE_CHECKING:
    import torch

_BASES = (("B", 1000), ("IB", 1024))
_UNITS = {"": 1} | {f"{letter}{unit}": base**power for power, letter in enumerate("KMGT", 1) for unit, base in _BASES}


def parse_bytes(text: str, where: str = "--max-memory") -> int:
    """A size such as "3GB", "512 MiB" or "100000" in bytes. where: how the message begins. Raises UsageError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)?\s*", text, flags=re.IGNORECASE)
    if not found:
        raise UsageError(f'{where}: found "{text}", expected a size', hint="such as 3GB, 1.5GB or 512MiB")
    return int(float(found[1]) * _UNITS[(found[2] or "").upper()])


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of mallopt(3)'s parameters."""

NEAR = 1 / 64
"""Of a limit, what is left for small pieces, which nobody counts: GPTQ of SmolLM2 peaked 3 to 23 MB below limits of 597
to 680 MB, and at 591 and 593 under 590."""

HOLES = 1 / 4
"""Of the room that is left under a limit, what is left between pieces of the arena, which come and go in several sizes.
Where rows took all of it, freed memory had to go back time and again (SmolLM2 under 680 MB: 1.7 million page faults,
for 0.3)."""


def room_within(limit_bytes: int, held_bytes: int) -> int:
    """What a process that holds so many bytes may still ask for under a limit; never below 0."""
    return int(max(0.0, limit_bytes * (1 - NEAR) - held_bytes) * (1 - HOLES))


def map_large_memory() -> None:
    """Have pieces that the C library lends from a megabyte on go back to the system once they are freed, where it is
    glibc. Otherwise it keeps them for later, in pieces between others: the arena is for what is large and many."""
    _set_up(_MMAP_THRESHOLD, 1 << 20)


def keep_freed_memory() -> None:
    """Have what is freed kept for what is allocated next, where the C library is glibc: for work that takes large
    pieces from it, one after the other. Else they come from the system and go back to it each time, and a page that it
    gives takes longer (0.5 to 2 microseconds for 4 KB) than most of what is done with it."""
    _set_up(_MMAP_THRESHOLD, 32 << 20)  # the most it takes
    _set_up(_TRIM_THRESHOLD, 1 << 30)


def _set_up(parameter: int, value: int) -> None:
    """mallopt(3), where the C library is glibc."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(parameter, value)


PAGE_S = 1e-6
"""Seconds that a page takes when it is asked for again: half a microsecond to two."""


def trim() -> float:
    """Give back to the system what the arena holds of freed memory, and the C library. Returns the seconds that it
    costs, with those for taking the pages again."""
    from quantkit import arena

    before, started = rss_bytes(), time.perf_counter()
    arena.give_back()
    _trim_heap()
    took = time.perf_counter() - started
    return took + max(0, before - rss_bytes()) // resource.getpagesize() * PAGE_S


def _trim_heap() -> None:
    """malloc_trim(3), where the C library is glibc."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class FreedMemory:
    """Gives freed memory back to the system now and then, the arena's and the C library's: the pieces that the latter
    keeps between the ones in use grow with every block of a model, though nothing more is in use.

    limit_bytes: give back what would else bring the process near to so much. None: all of it, but only where the
    process would else hold more than ever, and only when `SHARE` of the time since that was done last pays for it.
    """

    SHARE = 1 / 50

    def __init__(self, limit_bytes: int | None = None) -> None:
        self._near = None if limit_bytes is None else int(limit_bytes * (1 - NEAR))
        self._not_before = 0.0

    def give_back(self, coming: int, beside: int = 0) -> None:
        """Give it back, if it is time to. coming: bytes that the arena will be asked for next. beside: that others
        will."""
        if self._near is not None:
            self._keep_below(self._near - beside, coming)
        elif _held_with(coming) + beside > peak_rss_bytes() and time.perf_counter() >= self._not_before:
            self._not_before = trim() / self.SHARE + time.perf_counter()

    def _keep_below(self, near: int, coming: int) -> None:
        """The arena's pages serve again, so that no more of them go than have to, and come as far as there is room."""
        from quantkit import arena

        if _held_with(coming) > near:
            _trim_heap()
            if (over := _held_with(coming) - near) > 0:
                arena.give_back(keep=max(coming, arena.free_bytes() - over))
        arena.allow(max(0, near - rss_bytes()))


def _held_with(coming: int) -> int:
    """What the process will hold with so many bytes more, for which free pages of the arena serve."""
    from quantkit import arena

    return rss_bytes() + max(0, coming - arena.free_bytes())


@dataclass(frozen=True)
class MemoryLimit:
    """limit_bytes: the most resident memory the process should take; None leaves it half of what is free."""

    limit_bytes: int | None = None

    def room_bytes(self, device: torch.device) -> int:
        """What may still be taken on a device, as things stand now; never below 0.

        A limit speaks of host memory. A GPU has its own: half of what is free there.
        """
        import psutil
        import torch

        from quantkit import arena

        if device.type == "cuda":
            kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # free, but for torch alone
            return (torch.cuda.mem_get_info(device)[0] + kept) // 2
        if self.limit_bytes is None:
            return (int(psutil.virtual_memory().available) + arena.free_bytes()) // 2
        return room_within(self.limit_bytes, rss_bytes() - arena.free_bytes())


NO_LIMIT = MemoryLimit()


def memory_limit(text: str | None) -> MemoryLimit:
    """The limit that a command line gives. Raises UsageError when it is not a size."""
    return NO_LIMIT if text is None else MemoryLimit(parse_bytes(text))
