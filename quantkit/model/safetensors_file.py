"""One safetensors file: its header checked before anything is allocated, its tensors read one at a time.

Bytes are read, not mapped: mapped pages count towards the resident memory of the process until the file is closed, so a
pass over a large shard would measure as if the whole of it were held.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import ModelError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_DIMENSIONS = 8  # weights have two, convolutions of other models five

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes that unquantized weights have."""

ALL_DTYPES = {
    **DTYPES,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Those and what quantized weights are stored in."""

_DOWNLOAD_AGAIN = "the download may be incomplete: fetch the file again"


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its file. start, end: bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """The tensors of a file, by name in the order of their bytes.

    dtypes: names of those that are accepted. Raises ModelError when the file is damaged or holds others.
    """

    def __init__(self, path: Path, dtypes: Mapping[str, torch.dtype] = DTYPES):
        self.path = path
        self.dtypes = dtypes
        self.entries = _entries(path, dtypes)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some rows of its first axis, in memory of its own. Raises ModelError when the bytes are not
        there (any more)."""
        entry = self.entries[name]
        start, count, shape = entry.start, entry.end - entry.start, entry.shape
        if rows is not None:
            first, end, _ = rows.indices(shape[0])
            row_bytes = count // max(1, shape[0])
            start, count, shape = start + first * row_bytes, (end - first) * row_bytes, (end - first, *shape[1:])
        raw = torch.empty(count, dtype=torch.uint8)
        try:
            with self.path.open("rb", buffering=0) as stream:
                stream.seek(start)
                view = raw.numpy().data
                done = 0
                while done < count:  # one call reads 2 GB at most
                    got = stream.readinto(view[done:])
                    if not got:
                        raise ModelError(
                            f"{self.path}: {name}: expected {count} bytes, found {done}: the file changed while in use"
                        )
                    done += got
        except OSError as error:
            raise ModelError(f"{self.path}: {name}: cannot be read: {error.strerror}") from error
        return raw.view(self.dtypes[entry.dtype]).reshape(shape)


def _entries(path: Path, dtypes: Mapping[str, torch.dtype]) -> dict[str, Entry]:
    return checked_entries(path, *_header(path), dtypes)


def checked_entries(
    path: Path | str, header: dict[str, Any], begin: int, size: int, dtypes: Mapping[str, torch.dtype] = DTYPES
) -> dict[str, Entry]:
    """The tensors of a header, by name in the order of their bytes. begin: where data start; size: of the whole file.

    Raises ModelError when they overlap, leave gaps or do not end with the file.
    """
    entries, problems = {}, []
    for name, given in header.items():
        if name == "__metadata__":
            continue
        try:
            entries[name] = _entry(given, begin, dtypes)
        except ValueError as error:
            problems.append(f"{path}: {name}: {error}")
    if problems:
        shown = problems[:8] + ([f"and {len(problems) - 8} more tensors"] if len(problems) > 8 else [])
        raise ModelError("\n".join(shown), hint=_hint(problems))
    in_order = sorted(entries.items(), key=lambda item: (item[1].start, item[1].end))
    at, before = begin, "the header"
    for name, entry in in_order:
        if entry.start != at:
            kind = "overlaps" if entry.start < at else "leaves unused bytes after"
            raise ModelError(
                f"{path}: {name} {kind} {before}: begins at byte {entry.start}, expected {at}",
                hint="the header is damaged: fetch the file again",
            )
        at, before = entry.end, name
    if at != size:
        hint = _DOWNLOAD_AGAIN if size < at else "bytes were added at its end: fetch the file again"
        raise ModelError(f"{path}: expected {at} bytes by its header, found {size}", hint=hint)
    return dict(in_order)


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The JSON header, the byte at which data begins, and the size of the file."""
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size < 8:
                raise ModelError(f"{path}: expected 8 bytes of header length, found {size}", hint=_DOWNLOAD_AGAIN)
            length = int.from_bytes(stream.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise ModelError(
                    f"{path}: not a safetensors file: a header of {length} bytes, expected {MAX_HEADER_BYTES} or fewer",
                    hint="a file of a few hundred bytes may be a Git LFS pointer: fetch the real one",
                )
            if 8 + length > size:
                raise ModelError(
                    f"{path}: expected {8 + length} bytes or more by its header length, found {size}",
                    hint=_DOWNLOAD_AGAIN,
                )
            text = stream.read(length)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    return parse_header(path, text), 8 + length, size


def parse_header(path: Path | str, text: bytes) -> dict[str, Any]:
    """The object behind a header's bytes. Raises ModelError."""
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: the header is not JSON: {error}", hint=_DOWNLOAD_AGAIN) from error
    if not isinstance(header, dict):
        raise ModelError(f"{path}: the header is a {type(header).__name__}, expected an object by tensor name")
    return header


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name is given twice")
    return made


def _entry(given: Any, begin: int, dtypes: Mapping[str, torch.dtype]) -> Entry:
    """Where a tensor lies, by what the header says. Raises ValueError."""
    if not isinstance(given, dict) or not {"dtype", "shape", "data_offsets"} <= given.keys():
        raise ValueError("expected an object with dtype, shape and data_offsets")
    dtype, shape, offsets = given["dtype"], given["shape"], given["data_offsets"]
    if not _are_sizes(shape):
        raise ValueError(f"shape {str(shape)[:60]}, expected a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"data_offsets {str(offsets)[:60]}, expected [begin, end]")
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise ValueError(f"stored as {str(dtype)[:20]}, expected one of {', '.join(dtypes)}")
    wanted = math.prod(shape) * dtypes[dtype].itemsize
    if offsets[1] - offsets[0] != wanted:
        raise ValueError(f"holds {offsets[1] - offsets[0]} bytes, expected {wanted} for {dtype} {shape}")
    return Entry(dtype, tuple(shape), begin + offsets[0], begin + offsets[1])


def _are_sizes(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MAX_DIMENSIONS
        and all(type(size) is int and 0 <= size < 2**63 for size in value)
    )


def _hint(problems: list[str]) -> str:
    if any(": stored as " in line for line in problems):
        return "weights of integers or 8-bit floats are already quantized: take the original model"
    return "the header is damaged: fetch the file again"
