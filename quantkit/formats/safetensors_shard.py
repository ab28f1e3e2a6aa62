"""One safetensors file while it is written: data as they come, its header at the end.

Source: the format's own description: header length (8 bytes), JSON header, data without gaps.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from quantkit.errors import DataError

ALIGNMENT = 8
"""The widest value has 8 bytes: data that begin at a multiple of it can be used where they are mapped."""

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

METADATA = {"format": "pt"}

_TAIL_IN_MEMORY = 16 << 20
"""Bytes of small and odd-sized tensors that wait in memory; more of them wait in a file."""

_COPY_BYTES = 1 << 20


class Shard:
    """One file. Tensors of a size that would leave the next one misaligned wait, and follow all others at the end.

    again: the file is there already, and its tensors come by `begin_again` first.
    """

    def __init__(self, path: Path, room: int, *, again: bool = False):
        self.path = path
        self.room = room
        self.entries: dict[str, dict[str, Any]] = {}
        self.data_bytes = 0  # what waits included
        self.tail_bytes = 0
        if again and not path.is_file():
            raise lost(path)
        self._file: IO[bytes] = path.open("r+b" if again else "wb", buffering=0)
        if again:  # the header, where there is one, may have outgrown the room that was planned
            self.room = int.from_bytes(self._file.read(8), "little") or room
        self._file.seek(8 + self.room)
        self._to: IO[bytes] = self._file
        self._at = 0
        self._tail = tempfile.SpooledTemporaryFile(max_size=_TAIL_IN_MEMORY, dir=str(path.parent))  # noqa: SIM115
        self._waiting: list[tuple[str, Tensor, int]] = []  # name, a tensor without data, bytes
        self._tail_told = 0

    def begin(self, name: str, tensor: Tensor) -> None:
        """A tensor, of which shape and dtype count, is what is appended from here on."""
        size = tensor.nbytes
        self.data_bytes += size
        self._to = self._file
        if size % ALIGNMENT == 0:
            self._enter(name, tensor, size)
        else:
            self.tail_bytes += size
            self._waiting.append((name, tensor.to("meta"), size))
            self._tail.seek(0, os.SEEK_END)
            self._to = self._tail

    def append(self, rows: Tensor) -> None:
        """The next of the data, all of it or some rows."""
        _write(self._to, rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def begin_again(self, name: str, tensor: Tensor, tail: IO[bytes]) -> None:
        """A tensor, given without data, that the file holds already; its data are in `tail` if it has to wait."""
        self.begin(name, tensor)
        if self._to is self._tail:
            _write(self._tail, memoryview(tail.read(tensor.nbytes)))

    def new_tail(self) -> bytes:
        """What began to wait since this was last asked for."""
        if self._tail.closed:
            return b""
        self._tail.seek(self._tail_told)
        data = self._tail.read()
        self._tail_told += len(data)
        if self._file.closed:
            self.forget()
        return data

    def forget(self) -> None:
        """Give up what waited, once it has been appended."""
        self._tail.close()

    def sync(self) -> None:
        """Put the data on disk."""
        os.fsync(self._file.fileno())

    def drop_rest(self) -> None:
        """Cut off what follows the tensors that are entered. Raises DataError when they are not all there."""
        if self._at and os.fstat(self._file.fileno()).st_size < 8 + self.room + self._at:
            raise lost(self.path)
        self._file.truncate(8 + self.room + self._at)
        self._file.seek(8 + self.room + self._at)

    def _enter(self, name: str, tensor: Tensor, size: int) -> None:
        offsets = [self._at, self._at + size]
        self.entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        self._at = offsets[1]

    def complete(self) -> None:
        """Append what waits, the widest values first, write the header, fsync and close."""
        self.drop_rest()
        starts, start = [], 0
        for _, _, size in self._waiting:
            starts.append(start)
            start += size
        order = sorted(range(len(self._waiting)), key=lambda index: -self._waiting[index][1].element_size())
        for index in order:
            name, tensor, size = self._waiting[index]
            self._tail.seek(starts[index])
            self._enter(name, tensor, size)
            _copy(self._tail, self._file, size)
        header = {"__metadata__": METADATA, **self.entries}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > self.room:
            self._make_room(aligned(len(text)))
        self._file.seek(0)
        _write(self._file, memoryview(self.room.to_bytes(8, "little") + text.ljust(self.room)))
        os.fsync(self._file.fileno())
        self._file.close()

    def _make_room(self, room: int) -> None:
        """Copy the data behind a wider gap for the header."""
        wider = self.path.with_suffix(".wider")
        made = wider.open("wb", buffering=0)
        _write(made, memoryview(room.to_bytes(8, "little")))  # whoever goes on here has to know where the data begin
        made.seek(8 + room)
        with self.path.open("rb") as old:
            old.seek(8 + self.room)
            _copy(old, made, self._at)
        os.fsync(made.fileno())
        self._file.close()
        wider.replace(self.path)
        self._file, self.room = made, room


def _write(file: IO[bytes], data: memoryview) -> None:
    """All of it: one call of the system writes 2 GB at most, and less when the disk fills up."""
    done = 0
    while done < len(data):
        done += file.write(data[done:])


def _copy(source: IO[bytes], target: IO[bytes], count: int) -> None:
    while count:
        piece = source.read(min(count, _COPY_BYTES))
        assert piece, "the data were written before"
        _write(target, memoryview(piece))
        count -= len(piece)


def aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def lost(path: Path) -> DataError:
    return DataError(
        f"{path}: does not hold what the journal beside it says had been written", hint="--restart begins again"
    )
