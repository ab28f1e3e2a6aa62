"""llama.cpp's importance matrix: for each linear the sums of its inputs' squares, as a file of its own.

Two layouts are read: the one in GGUF, which is also written, and the older one of bare numbers.
Source: llama.cpp, tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.maths.gram import Importance
from quantkit.model.gguf_file import DEFAULT_ALIGNMENT, MAGIC, GGUFFile

_SUMS, _COUNTS = ".in_sum2", ".counts"
_VERSION, _UINT32, _STRING, _ARRAY, _F32 = 3, 4, 8, 9, 0


@dataclass(frozen=True)
class Imatrix:
    """What an importance matrix holds.

    entries: {name of a tensor in GGUF, such as "blk.0.attn_q.weight": importance of its columns}. datasets: what the
    inputs were of. chunks: how many sequences; chunk_size: their length in tokens, 0 where the file does not tell.
    """

    entries: Mapping[str, Importance]
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int


def read_imatrix(path: Path) -> Imatrix:
    """An importance matrix in either layout. Raises ModelError when the file is missing, damaged or of experts."""
    try:
        with path.open("rb") as opened:
            start = opened.read(len(MAGIC))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error}", hint="expected an imatrix file of llama.cpp") from error
    found = _read_gguf(path) if start == MAGIC else _read_legacy(path)
    for name, entry in found.entries.items():
        if not bool((torch.isfinite(entry.squares) & (entry.squares >= 0)).all()):
            raise ModelError(f"{path}: {name}: sums of squares must be finite and not negative")
    return found


def write_imatrix(path: Path, matrix: Imatrix) -> None:
    """Write an importance matrix in the layout in GGUF, tensors in the order of their names."""
    tensors: list[tuple[str, Tensor]] = []
    for name in sorted(matrix.entries, key=str.encode):
        entry = matrix.entries[name]
        tensors += [(name + _SUMS, entry.squares.float().cpu()), (name + _COUNTS, torch.tensor([float(entry.count)]))]
    keys = [
        _string("general.type") + struct.pack("<I", _STRING) + _string("imatrix"),
        _string("imatrix.datasets") + struct.pack("<IIQ", _ARRAY, _STRING, len(matrix.datasets)),
        *map(_string, matrix.datasets),
        _string("imatrix.chunk_count") + struct.pack("<II", _UINT32, matrix.chunks),
        _string("imatrix.chunk_size") + struct.pack("<II", _UINT32, matrix.chunk_size),
    ]
    table, offset = [], 0
    for name, values in tensors:
        table.append(_string(name) + struct.pack("<IQIQ", 1, values.numel(), _F32, offset))
        offset += _padded(4 * values.numel())
    header = MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), 4) + b"".join(keys) + b"".join(table)
    with path.open("wb") as file:
        file.write(header.ljust(_padded(len(header)), b"\0"))
        for _, values in tensors:
            data = values.contiguous().numpy().tobytes()
            file.write(data.ljust(_padded(len(data)), b"\0"))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _padded(count: int) -> int:
    return -(-count // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _read_gguf(path: Path) -> Imatrix:
    file = GGUFFile(path)
    if file.metadata.get("general.type") != "imatrix":
        raise ModelError(f"{path}: is a GGUF file, but not an importance matrix: its general.type is not imatrix")
    entries = {}
    for name in file.tensors:
        if not name.endswith(_SUMS):
            continue
        weight = name.removesuffix(_SUMS)
        if weight + _COUNTS not in file.tensors:
            raise ModelError(f"{path}: {weight}: sums without counts", hint="the file is damaged")
        counts = file.decoded(weight + _COUNTS).flatten()
        if counts.numel() != 1:
            raise ModelError(f"{path}: {weight}: {counts.numel()} counts; mixtures of experts are not supported")
        if not 0 <= float(counts) < 2**63:
            raise ModelError(f"{path}: {weight}: a count of {float(counts)}; expected 0 or more", hint="it is damaged")
        entries[weight] = Importance(file.decoded(name).flatten(), round(float(counts)))
    if not entries:
        raise ModelError(f"{path}: holds no importance of any tensor")
    keys = file.metadata
    return Imatrix(
        entries,
        tuple(keys.get("imatrix.datasets", ())),
        int(keys.get("imatrix.chunk_count", 0)),
        int(keys.get("imatrix.chunk_size", 0)),
    )


def _read_legacy(path: Path) -> Imatrix:
    """int32 count of entries; each: length and name, calls, length and float32 sums. Then calls, length and data set.

    The end, from the calls on, may be missing.
    """
    reader = _Legacy(path)
    entries = {}
    for _ in range(reader.integer(least=1)):
        name = reader.take(reader.integer(least=1)).decode("utf-8", errors="replace")
        calls = reader.integer(least=0)
        values = np.frombuffer(reader.take(4 * reader.integer(least=1)), "<f4").copy()
        entries[name] = Importance(torch.from_numpy(values), calls or 1)
    if reader.at_end():
        return Imatrix(entries, (), 0, 0)
    chunks = reader.integer(least=0)
    dataset = "" if reader.at_end() else reader.take(reader.integer(least=0)).decode("utf-8", errors="replace")
    return Imatrix(entries, (dataset,) if dataset else (), chunks, 0)


class _Legacy:
    """The bytes of a file in the older layout, taken one after the other."""

    def __init__(self, path: Path):
        self.path, self.data, self.at = path, path.read_bytes(), 0

    def at_end(self) -> bool:
        return self.at == len(self.data)

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise ModelError(
                f"{self.path}: byte {self.at}: expected {count} more, the file has {len(self.data)}",
                hint="it is no importance matrix, or the download is incomplete",
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def integer(self, least: int) -> int:
        (value,) = struct.unpack("<i", self.take(4))
        if value < least:
            raise ModelError(
                f"{self.path}: byte {self.at - 4}: found {value}, expected {least} or more",
                hint="it is no importance matrix, or damaged",
            )
        return int(value)
