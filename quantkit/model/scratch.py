"""A scratch file: bytes that are held beside memory for as long as a run needs them."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SPARE_BYTES = 256 << 20
"""What a file that can be done without leaves of a disk."""


class ScratchFile:
    """So many bytes in a file of a folder. It has no name once it is open, so that nothing is left behind however the
    process ends; it is read and written without mapping, so that its pages are never this process's own.

    Raises OSError when the disk has no room for all of it.
    """

    def __init__(self, folder: Path, size: int):
        self.size = size
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - it lives as long as this
        os.posix_fallocate(self._file.fileno(), 0, size)  # a full disk is found now, not in an hour

    def read(self, start: int, tensor: Tensor) -> None:
        """Fill a tensor on the CPU that is in one piece with the bytes from `start` on."""
        view, done = _bytes_of(tensor), 0
        while done < len(view):
            done += os.preadv(self._file.fileno(), [view[done:]], start + done)

    def write(self, start: int, tensor: Tensor) -> None:
        """The bytes of a tensor on the CPU, from `start` on."""
        view, done = _bytes_of(tensor.contiguous()), 0
        while done < len(view):
            done += os.pwrite(self._file.fileno(), view[done:], start + done)


class ScratchRoom:
    """A scratch file in a folder that one piece of work leaves to the next, so that it is made once, and what is
    written lies in pages that the system holds for it already."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._left: ScratchFile | None = None

    def take(self, size: int) -> ScratchFile | None:
        """A file of so many bytes or more, which holds anything; None of none or where the disk has hardly room."""
        left, self._left = self._left, None
        if not size:
            return None
        if left is not None and size <= left.size:
            return left
        del left  # the disk has its room
        if shutil.disk_usage(self.folder).free < size + SPARE_BYTES:
            return None
        try:
            return ScratchFile(self.folder, size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            return None

    def leave(self, file: ScratchFile | None) -> None:
        """A file that was taken is free again. It goes where the disk has not as much room besides: what is written
        meanwhile, such as hidden states of a checkpoint, has to find some, and this file can be done without."""
        if file is not None and shutil.disk_usage(self.folder).free >= SPARE_BYTES + file.size:
            self._left = file


def _bytes_of(tensor: Tensor) -> memoryview:
    """Of a tensor in one piece, shared with it."""
    return tensor.view(-1).view(torch.uint8).numpy().data
