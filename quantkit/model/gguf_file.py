"""The container: a GGUF file's header, parsed with every length checked against the file, and its tensors' bytes.

Source: llama.cpp's docs of the GGUF format, version 3 (2 differs in nothing that is read here).
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.maths.ggml import decode, type_size

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4

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
        try:
            return self.take(self.scalar("<Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"{self.path}: byte {start}: a text is not UTF-8", hint="the file is damaged") from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.scalar("<I"), self.scalar("<Q")
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
            self.metadata[key] = cursor.value(cursor.scalar("<I"))
        found = [self._tensor_info(cursor) for _ in range(tensor_count)]
        alignment = int(self.metadata.get("general.alignment", DEFAULT_ALIGNMENT))
        if alignment < 1:
            raise ModelError(f"{path}: general.alignment: {alignment}; expected a positive number")
        base = -(-cursor.at // alignment) * alignment
        self.tensors = {
            name: TensorInfo(name, shape, type_name, base + offset, size)
            for name, shape, type_name, offset, size in found
        }
        self._check_ends()

    def _tensor_info(self, cursor: _Cursor) -> tuple[str, tuple[int, ...], str, int, int]:
        from gguf.constants import GGMLQuantizationType

        name = cursor.string()
        dimensions = cursor.scalar("<I")
        if dimensions > MAX_DIMENSIONS:
            raise ModelError(f"{self.path}: {name}: {dimensions} dimensions; expected at most {MAX_DIMENSIONS}")
        sizes = [cursor.scalar("<Q") for _ in range(dimensions)]
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
        return name, shape, type_name, offset, rows * type_size(type_name, shape[-1] if shape else 1)

    def _check_ends(self) -> None:
        end = max((info.start + info.size for info in self.tensors.values()), default=0)
        if end > len(self._map):
            cut = [info.name for info in self.tensors.values() if info.start + info.size > len(self._map)]
            raise ModelError(
                f"{self.path}: {len(cut)} of {len(self.tensors)} tensors lie beyond the end of the file, the first is "
                f"{cut[0]}: expected {end} bytes, found {len(self._map)}",
                hint="the download is incomplete: fetch the file again",
            )

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
