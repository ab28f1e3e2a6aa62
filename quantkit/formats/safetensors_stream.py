"""Safetensors files written as their tensors come, with one group of tensors in memory at a time.

The header of the format stands before the data and may end in spaces: room for it is left free and filled at the end.
Source: the format's own description: header length (8 bytes), JSON header, data without gaps.
"""

from __future__ import annotations

import base64
import errno
import io
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import DataError
from quantkit.formats.safetensors_shard import DTYPE_NAMES, METADATA, Shard, aligned
from quantkit.manifest import fsync_folder, write_atomic

MAX_SHARD_BYTES = 5_000_000_000
_INDEX = "model.safetensors.index.json"

_ENTRY_BYTES = len('"":{"dtype":"BF16","shape":[,],"data_offsets":[,]},') + 2 * 10 + 2 * 11
"""One header entry without its name: two sizes of 10 digits, two offsets of 11 (a shard has at most 10)."""

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

_FINAL_NAME = re.compile(r"model(?:-(\d{5})-of-\d{5})?\.safetensors")


def header_bound(names: Iterable[str]) -> int:
    """Bytes that a header with these tensors will take, or a little more; tensors of up to two dimensions."""
    entries = sum(_ENTRY_BYTES + len(json.dumps(name, ensure_ascii=False).encode()) - 2 for name in names)
    return entries + len(json.dumps({"__metadata__": METADATA}))


def stream_bytes(groups: Iterable[Mapping[str, int]], max_shard_bytes: int) -> list[int]:
    """Bytes of each file that a stream will write, the index left out, for groups of {tensor: bytes of its data} that
    come in this order."""
    groups = list(groups)
    room = aligned(header_bound(name for group in groups for name in group))
    held: list[int] = []
    for group in groups:
        size = sum(group.values())
        if not held or (held[-1] > 0 and held[-1] + size > max_shard_bytes):
            held.append(0)
        held[-1] += size
    return [8 + room + size for size in held]


class SafetensorsStream:
    """Writes model.safetensors, or shards with an index when the tensors take more than a shard may.

    names: tensors that will come; more or other ones are allowed and cost a copy of the file when the header outgrows
    its room. max_shard_bytes: data a file holds at most, unless a single group is larger. The same tensors in the same
    order give the same bytes, whether one stream wrote them all or another went on behind a checkpoint. Raises
    DataError when the disk is full or cannot be written.
    """

    def __init__(self, folder: Path, names: Iterable[str], max_shard_bytes: int = MAX_SHARD_BYTES):
        self.folder = folder
        self.max_shard_bytes = max_shard_bytes
        self._room = aligned(header_bound(names))
        self._shards: list[Shard] = []
        self._names: set[str] = set()
        self._new: list[list[list[Any]]] = []  # name, dtype and shape of each group since the last checkpoint

    def add(self, tensors: Mapping[str, Tensor]) -> int:
        """Append tensors that belong together: they share a shard. Returns the bytes of their data."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        with explained(self.folder, size):
            self._begin_group(tensors, size)
            for name, tensor in tensors.items():
                self._shards[-1].begin(name, tensor)
                self._shards[-1].append(tensor)
        return size

    def add_rows(self, name: str, rows: Tensor, shape: tuple[int, ...], first_row: int) -> int:
        """Append rows of a tensor of `shape` from `first_row` on; the last rows come before any other tensor. Returns
        the bytes of their data."""
        with explained(self.folder, rows.nbytes):
            if first_row == 0:
                whole = torch.empty(shape, dtype=rows.dtype, device="meta")
                self._begin_group({name: whole}, whole.nbytes)
                self._shards[-1].begin(name, whole)
            self._shards[-1].append(rows)
        return rows.nbytes

    def _begin_group(self, tensors: Mapping[str, Tensor], size: int, *, again: bool = False) -> None:
        """Choose the shard. again: the group was written before, by a stream that this one goes on behind."""
        twice = self._names & tensors.keys()
        assert not twice, f"written twice: {', '.join(sorted(twice))}"
        self._names |= tensors.keys()
        held = self._shards[-1].data_bytes if self._shards else None
        if held is None or (held > 0 and held + size > self.max_shard_bytes):
            if self._shards:
                self._shards[-1].complete()
            path = self.folder / _partial_name(len(self._shards) + 1)
            self._shards.append(Shard(path, self._room, again=again))
        if not again:
            new = [[name, DTYPE_NAMES[value.dtype], list(value.shape)] for name, value in tensors.items()]
            self._new.append(new)

    def checkpoint(self) -> dict[str, Any]:
        """Put on disk what was added since the last checkpoint, and tell what `restore` needs to know of it: JSON."""
        with explained(self.folder, 0):
            if self._shards:
                self._shards[-1].sync()
            tail = b"".join(shard.new_tail() for shard in self._shards)
        new, self._new = self._new, []
        return {"groups": new, "tail": base64.b64encode(tail).decode()}

    def restore(self, checkpoints: Sequence[Mapping[str, Any]]) -> None:
        """Go on behind all checkpoints of an earlier stream with the same settings; what it added later is dropped.

        Raises DataError when the folder does not hold what had been written.
        """
        assert not self._shards, "a stream goes on before anything is added"
        with explained(self.folder, 0):
            for path in list(self.folder.iterdir()):
                if found := _FINAL_NAME.fullmatch(path.name):
                    path.rename(self.folder / _partial_name(int(found[1] or 1)))
            for checkpoint in checkpoints:
                tail = io.BytesIO(base64.b64decode(checkpoint["tail"]))
                for group in checkpoint["groups"]:
                    tensors = {
                        name: torch.empty(shape, dtype=_DTYPES[dtype], device="meta") for name, dtype, shape in group
                    }
                    self._begin_group(tensors, sum(value.nbytes for value in tensors.values()), again=True)
                    for name, tensor in tensors.items():
                        self._shards[-1].begin_again(name, tensor, tail)
            for shard in self._shards:
                shard.new_tail()  # the journal has it
            if self._shards:
                self._shards[-1].drop_rest()
            used = {shard.path for shard in self._shards}
            for path in list(self.folder.iterdir()):
                if path not in used:
                    path.unlink()

    def finish(self) -> list[Path]:
        """Complete the files, give them their names and fsync; returns every path."""
        assert self._shards, "no tensor was written"
        with explained(self.folder, self._shards[-1].tail_bytes):
            self._shards[-1].complete()
            paths = [self.folder / name for name in file_names(len(self._shards))]
            weights = paths[: len(self._shards)]
            for shard, path in zip(self._shards, weights, strict=True):
                shard.path.rename(path)
                shard.forget()
            if len(paths) > 1:
                files = zip(self._shards, weights, strict=True)
                weight_map = {name: path.name for shard, path in files for name in shard.entries}
                total = sum(shard.data_bytes for shard in self._shards)
                index = {"metadata": {"total_size": total}, "weight_map": weight_map}
                write_atomic(paths[-1], (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
            fsync_folder(self.folder)
        return paths


def _partial_name(index: int) -> str:
    return f".model-{index:05d}.partial"


def file_names(count: int) -> list[str]:
    """What a stream's files are called when so many hold tensors; of more than one the index comes last."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)] + [_INDEX]


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
