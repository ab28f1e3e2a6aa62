"""The container: a GGUF file's header, parsed with every length checked against the file, and its tensors' bytes.

Source: llama.cpp's docs of the GGUF format, version 3 (2 differs in nothing that is read here).
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.maths.ggml import decode, type_size
from quantkit.model.gguf_check import check_metadata

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
MAX_TEXT_BYTES = 16 << 20  # chat templates have 10 KB
MAX_ITEMS = 16 << 20  # vocabularies have 300,000 tokens
MAX_ALIGNMENT = 1 << 20

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: shape with the row last, ggml's type name, byte range in the file."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    start: int
    size: int


class _Cursor:
    """Reads forward through the header; every read is checked against the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path, self.at = data, path, 0

    def take(self, size: int) -> bytes:
        if self.at + size > len(self.data):
            raise ModelError(
                f"{self.path}: the header needs at least {self.at + size} bytes, the file has {len(self.data)}",
                hint="the file is cut off or damaged: fetch it again",
            )
        self.at += size
        return self.data[self.at - size : self.at]

    def scalar(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        start = self.at
        length = self.scalar("<Q")
        self._bound(start, length, MAX_TEXT_BYTES, "bytes of a text")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"{self.path}: byte {start}: a text is not UTF-8", hint="the file is damaged") from error

    def _bound(self, start: int, found: int, most: int, what: str) -> None:
        """Raises ModelError for a length that the file may have room for and no model needs."""
        if most < found <= len(self.data) - self.at:
            raise ModelError(
                f"{self.path}: byte {start}: {found} {what}, expected {most} or fewer", hint="the file is damaged"
            )

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            start = self.at
            item, count = self.scalar("<I"), self.scalar("<Q")
            self._bound(start, count, MAX_ITEMS, "items of a list")
            if item == _ARRAY:
                raise ModelError(f"{self.path}: byte {start}: a list of lists, expected numbers or texts")
            if item in _SCALARS:
                size = struct.calcsize(_SCALARS[item])
                return np.frombuffer(self.take(size * count), dtype=_SCALARS[item]).tolist()
            if count > len(self.data):  # every item takes a byte or more
                self.take(count)
            return [self.value(item) for _ in range(count)]
        if kind not in _SCALARS:
            raise ModelError(
                f"{self.path}: byte {self.at}: unknown value type {kind} in the header", hint="the file is damaged"
            )
        return self.scalar(_SCALARS[kind])


class GGUFFile:
    """A GGUF file: `metadata` {key: value}, `tensors` {name: TensorInfo}, bytes memory-mapped.

    Raises ModelError when the file is missing, is not GGUF, or ends before its header or a tensor does.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: cannot be read: {error}", hint="expected a GGUF file") from error
        cursor = _Cursor(self._map, path)
        if cursor.take(4) != MAGIC:
            raise ModelError(f"{path}: is not a GGUF file: it does not begin with the bytes GGUF")
        version = cursor.scalar("<I")
        if version not in VERSIONS:
            raise ModelError(
                f"{path}: GGUF version {version}; expected {' or '.join(map(str, VERSIONS))}",
                hint="an old or big-endian file: convert it again with a current llama.cpp",
            )
        tensor_count, key_count = cursor.scalar("<Q"), cursor.scalar("<Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = cursor.string()
            if key in self.metadata:
                raise ModelError(f"{path}: {key}: given twice in the header", hint="the file is damaged")
            self.metadata[key] = cursor.value(cursor.scalar("<I"))
        found = [self._tensor_info(cursor) for _ in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT:
            raise ModelError(
                f"{path}: general.alignment: {str(alignment)[:60]}; expected a positive number up to {MAX_ALIGNMENT}"
            )
        check_metadata(str(path), self.metadata)
        base = -(-cursor.at // alignment) * alignment
        self.data_start, self.size = base, len(self._map)
        self.tensors = {
            name: TensorInfo(name, shape, type_name, base + offset, size)
            for name, shape, type_name, offset, size in found
        }
        if len(self.tensors) < len(found):
            names = [name for name, *_ in found]
            twice = next(name for name, count in Counter(names).items() if count > 1)
            raise ModelError(f"{path}: {twice}: given twice among the tensors", hint="the file is damaged")
        self._check_ends()

    def _tensor_info(self, cursor: _Cursor) -> tuple[str, tuple[int, ...], str, int, int]:
        from gguf.constants import GGMLQuantizationType

        name = cursor.string()
        dimensions = cursor.scalar("<I")
        if not 0 < dimensions <= MAX_DIMENSIONS:
            raise ModelError(f"{self.path}: {name}: {dimensions} dimensions; expected 1 to {MAX_DIMENSIONS}")
        sizes = [cursor.scalar("<Q") for _ in range(dimensions)]
        if 0 in sizes:
            raise ModelError(f"{self.path}: {name}: sizes {sizes}; expected none of 0", hint="the file is damaged")
        number = cursor.scalar("<I")
        try:
            type_name = GGMLQuantizationType(number).name
        except ValueError as error:
            raise ModelError(
                f"{self.path}: {name}: ggml type number {number} is unknown",
                hint="take the model in another type, such as Q8_0",
            ) from error
        shape = tuple(reversed(sizes))  # the file has the row first
        rows = 1
        for size in shape[:-1]:
            rows *= size
        offset = cursor.scalar("<Q")
        return name, shape, type_name, offset, rows * type_size(type_name, shape[-1])

    def _check_ends(self) -> None:
        end = max((info.start + info.size for info in self.tensors.values()), default=0)
        if end > len(self._map):
            cut = [info.name for info in self.tensors.values() if info.start + info.size > len(self._map)]
            raise ModelError(
                f"{self.path}: {len(cut)} of {len(self.tensors)} tensors lie beyond the end of the file, the first is "
                f"{cut[0]}: expected {end} bytes, found {len(self._map)}",
                hint="the download is incomplete: fetch the file again",
            )

        at, before = self.data_start, "the header"
        for info in sorted(self.tensors.values(), key=lambda info: info.start):
            if info.start < at:
                raise ModelError(
                    f"{self.path}: {info.name} overlaps {before}: begins at byte {info.start}, expected {at} or more",
                    hint="the file is damaged",
                )
            at, before = info.start + info.size, info.name

    def bytes_at(self, start: int, end: int) -> bytes:
        """The bytes of the file from start to end; none when end comes first."""
        return self._map[start:end]

    def raw(self, name: str, rows: slice = slice(None)) -> Tensor:
        """The bytes of a tensor, or of some rows of its first axis: uint8 [rows, row_bytes], a copy."""
        info = self.tensors[name]
        first, end, _ = rows.indices(info.shape[0] if info.shape else 1)
        each = info.size // max(1, info.shape[0] if info.shape else 1)
        start, count = info.start + first * each, (end - first) * each
        copied = np.frombuffer(self._map, dtype=np.uint8, count=count, offset=start).copy()
        if count and hasattr(mmap, "MADV_DONTNEED"):
            # mapped pages count as resident until they are let go: a pass over the file would seem to hold all of it
            page = start // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, page, start + count - page)
        return torch.from_numpy(copied).reshape(-1, type_size(info.type_name, info.shape[-1]))

    def decoded(self, name: str, rows: slice = slice(None)) -> Tensor:
        """The values of a tensor, or of some rows of its first axis: float32 in its shape."""
        info = self.tensors[name]
        shape = (len(range(*rows.indices(info.shape[0]))), *info.shape[1:]) if info.shape else info.shape
        return decode(self.raw(name, rows), info.type_name, shape)
