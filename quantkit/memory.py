"""How much memory a run may take: the user's limit, or a share of what the machine has free."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit.errors import UsageError

if TYPE_CHECKING:
    import torch

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str) -> int:
    """A size such as "3GB", "512 MiB" or "100000" in bytes. Raises UsageError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)?\s*", text, flags=re.IGNORECASE)
    if not found:
        raise UsageError(f'--max-memory: found "{text}", expected a size', hint="such as 3GB, 1.5GB or 512MiB")
    return int(float(found[1]) * _UNITS[(found[2] or "").upper()])


def return_freed_memory() -> None:
    """Have the C library give every large block back to the system at once, where it is glibc.

    Otherwise it keeps what was freed for later, in pieces: a third more memory than is in use. It costs a fifth of the
    speed, so it is done only under a limit.
    """
    threshold = -3  # M_MMAP_THRESHOLD of mallopt(3)
    try:
        ctypes.CDLL(None).mallopt(threshold, 2**20)
    except (OSError, AttributeError):
        return


def trim_freed_memory() -> None:
    """Have the C library give back now what it keeps of freed memory, where it is glibc."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


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

        if device.type == "cuda":
            return torch.cuda.mem_get_info(device)[0] // 2
        if self.limit_bytes is None:
            return int(psutil.virtual_memory().available) // 2
        return max(0, self.limit_bytes - int(psutil.Process().memory_info().rss))


NO_LIMIT = MemoryLimit()


def memory_limit(text: str | None) -> MemoryLimit:
    """The limit that a command line gives. Raises UsageError when it is not a size."""
    return NO_LIMIT if text is None else MemoryLimit(parse_bytes(text))
