"""Safetensors files written as their tensors come, with one group of tensors in memory at a time.

The header of the format stands before the data and may end in spaces: room for it is left free and filled at the end.
Source: the format's own description: header length (8 bytes), JSON header, data without gaps.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from quantkit.errors import DataError
from quantkit.manifest import fsync_folder, write_atomic

MAX_SHARD_BYTES = 5_000_000_000

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

_ENTRY_BYTES = len('"":{"dtype":"BF16","shape":[,],"data_offsets":[,]},') + 2 * 10 + 2 * 11
"""One header entry without its name: two sizes of 10 digits, two offsets of 11 (a shard has at most 10)."""

_METADATA = {"format": "pt"}

_TAIL_IN_MEMORY = 16 << 20
"""Bytes of small and odd-sized tensors that wait in memory; more of them wait in a file."""

_COPY_BYTES = 1 << 20


def header_bound(names: Iterable[str]) -> int:
    """Bytes that a header with these tensors will take, or a little more; tensors of up to two dimensions."""
    entries = sum(_ENTRY_BYTES + len(json.dumps(name, ensure_ascii=False).encode()) - 2 for name in names)
    return entries + len(json.dumps({"__metadata__": _METADATA}))


class SafetensorsStream:
    """Writes model.safetensors, or shards with an index when the tensors take more than a shard may.

    names: tensors that will come; more or other ones are allowed and cost a copy of the file when the header outgrows
    its room. max_shard_bytes: data a file holds at most, unless a single group is larger. The same tensors in the same
    order give the same bytes. Raises DataError when the disk is full or cannot be written.
    """

    def __init__(self, folder: Path, names: Iterable[str], max_shard_bytes: int = MAX_SHARD_BYTES):
        self.folder = folder
        self.max_shard_bytes = max_shard_bytes
        self._room = _aligned(header_bound(names))
        self._shards: list[_Shard] = []
        self._names: set[str] = set()

    def add(self, tensors: Mapping[str, Tensor]) -> int:
        """Append tensors that belong together: they share a shard. Returns the bytes of their data."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        with explained(self.folder, size):
            self._make_place(tensors.keys(), size)
            for name, tensor in tensors.items():
                self._shards[-1].begin(name, tensor.to("meta"))
                self._shards[-1].append(tensor)
        return size

    def add_rows(self, name: str, rows: Tensor, shape: tuple[int, ...], first_row: int) -> int:
        """Append rows of a tensor of `shape` from `first_row` on; the last rows come before any other tensor. Returns
        the bytes of their data."""
        with explained(self.folder, rows.numel() * rows.element_size()):
            if first_row == 0:
                whole = torch.empty(shape, dtype=rows.dtype, device="meta")
                self._make_place({name}, whole.numel() * whole.element_size())
                self._shards[-1].begin(name, whole)
            self._shards[-1].append(rows)
        return rows.numel() * rows.element_size()

    def _make_place(self, names: Set[str], size: int) -> None:
        """Begin a shard where the last one has no room for so many bytes of tensors that belong together."""
        twice = self._names & names
        assert not twice, f"written twice: {', '.join(sorted(twice))}"
        self._names |= names
        held = self._shards[-1].data_bytes if self._shards else None
        if held is None or (held > 0 and held + size > self.max_shard_bytes):
            self._next_shard()

    def _next_shard(self) -> None:
        if self._shards:
            self._shards[-1].complete()
        path = self.folder / f".model-{len(self._shards) + 1:05d}.partial"
        self._shards.append(_Shard(path, self._room))

    def finish(self) -> list[Path]:
        """Complete the files, give them their names and fsync; returns every path."""
        assert self._shards, "no tensor was written"
        with explained(self.folder, self._shards[-1].tail_bytes):
            self._shards[-1].complete()
            paths = [self.folder / name for name in _file_names(len(self._shards))]
            for shard, path in zip(self._shards, paths, strict=True):
                shard.path.rename(path)
            if len(paths) > 1:
                files = zip(self._shards, paths, strict=True)
                weight_map = {name: path.name for shard, path in files for name in shard.entries}
                total = sum(shard.data_bytes for shard in self._shards)
                index = {"metadata": {"total_size": total}, "weight_map": weight_map}
                paths.append(self.folder / "model.safetensors.index.json")
                write_atomic(paths[-1], (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
            fsync_folder(self.folder)
        return paths


class _Shard:
    """One file. Tensors of a size that would leave the next one misaligned wait, and follow all others at the end."""

    def __init__(self, path: Path, room: int):
        self.path = path
        self.room = room
        self.entries: dict[str, dict[str, Any]] = {}
        self.data_bytes = 0  # what waits included
        self.tail_bytes = 0
        self._file: IO[bytes] = path.open("wb", buffering=0)
        self._to: IO[bytes] = self._file
        self._file.seek(8 + room)
        self._at = 0
        self._tail = tempfile.SpooledTemporaryFile(max_size=_TAIL_IN_MEMORY, dir=str(path.parent))  # noqa: SIM115
        self._waiting: list[tuple[str, Tensor, int]] = []  # name, a tensor without data, bytes

    def begin(self, name: str, tensor: Tensor) -> None:
        """A tensor, of which shape and dtype count, is what is appended from here on."""
        size = tensor.numel() * tensor.element_size()
        self.data_bytes += size
        self._to = self._file
        if size % ALIGNMENT == 0:
            self._enter(name, tensor, size)
        else:
            self.tail_bytes += size
            self._waiting.append((name, tensor, size))
            self._to = self._tail

    def append(self, rows: Tensor) -> None:
        """The next of the data, all of it or some rows."""
        _write(self._to, rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

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
        self._tail.close()
        header = {"__metadata__": _METADATA, **self.entries}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > self.room:
            self._make_room(_aligned(len(text)))
        self._file.seek(0)
        _write(self._file, memoryview(self.room.to_bytes(8, "little") + text.ljust(self.room)))
        os.fsync(self._file.fileno())
        self._file.close()

    def _make_room(self, room: int) -> None:
        """Copy the data behind a wider gap for the header."""
        wider = self.path.with_suffix(".wider")
        made = wider.open("wb", buffering=0)
        made.seek(8 + room)
        with self.path.open("rb") as old:
            old.seek(8 + self.room)
            _copy(old, made, self._at)
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


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]


@contextmanager
def explained(path: Path, needed_bytes: int) -> Iterator[None]:
    """Turn a failing write into a DataError. needed_bytes: of what is being written."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path).free
            raise DataError(
                f"{where}: no space left: needed {needed_bytes / 1e6:.1f} MB more, free {free / 1e6:.1f} MB",
                hint="free some space or give --out on another disk",
            ) from error
        raise DataError(
            f"{where}: cannot be written: {error.strerror}", hint="check the folder, or give --out on another disk"
        ) from error
