"""A scratch file: bytes that are held beside memory for as long as a run needs them."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


class ScratchFile:
    """So many bytes in a file of a folder. It has no name once it is open, so that nothing is left behind however the
    process ends; it is read and written without mapping, so that its pages are never this process's own.

    Raises OSError when the disk has no room for all of it.
    """

    def __init__(self, folder: Path, size: int):
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - it lives as long as this
        os.posix_fallocate(self._file.fileno(), 0, size)  # a full disk is found now, not in an hour

    def read(self, start: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor whose bytes begin at `start`."""
        tensor = torch.empty(shape, dtype=dtype)
        view, done = _bytes_of(tensor), 0
        while done < len(view):
            done += os.preadv(self._file.fileno(), [view[done:]], start + done)
        return tensor

    def write(self, start: int, tensor: Tensor) -> None:
        """The bytes of a tensor on the CPU, from `start` on."""
        view, done = _bytes_of(tensor.contiguous()), 0
        while done < len(view):
            done += os.pwrite(self._file.fileno(), view[done:], start + done)


def file_if_room(folder: Path, size: int) -> ScratchFile | None:
    """A scratch file of so many bytes, None of none or where the disk has no room for it."""
    try:
        return ScratchFile(folder, size) if size else None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        return None


def _bytes_of(tensor: Tensor) -> memoryview:
    """Of a tensor in one piece, shared with it."""
    return tensor.view(-1).view(torch.uint8).numpy().data
