"""quantkit.json: what an artifact is, what it was made from, and the hash of every file beside it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from quantkit.errors import ModelError
from quantkit.schema import Frozen

MANIFEST_NAME = "quantkit.json"
MANIFEST_SCHEMA_VERSION = 2
"""2 adds manifest_sha256; 1 is read as well."""

WEIGHT_FILES = (".safetensors", ".gguf")
"""Endings of the files of an artifact that hold weights."""

_NO_HASH = "0" * 64


MAX_MANIFEST_BYTES = 50_000_000  # a record takes 200 bytes, the largest published models have 60,000 linears


class TensorRecord(Frozen):
    """One linear: what was asked, what was done, what it cost."""

    name: str
    requested: str = Field(description='label of the method that the recipe asks for, or "skip"')
    applied: str = Field(description='what was done, or "unquantized"')
    bits_per_weight: float = Field(description="from the bytes in the file")
    sqnr_db: float | None = Field(None, description="signal to quantization noise of the weight, in dB")
    reason: str | None = Field(None, description="why applied differs from requested, or what was noticed")


class FileRecord(Frozen):
    name: str
    bytes: int
    sha256: str


def weight_bytes(files: Iterable[FileRecord]) -> int:
    """Of the files that hold weights."""
    return sum(record.bytes for record in files if record.name.endswith(WEIGHT_FILES))


class Manifest(Frozen):
    """The lineage and the content of one artifact."""

    schema_version: int = MANIFEST_SCHEMA_VERSION
    name: str
    created: str = Field(description="UTC, ISO 8601")
    quantkit_version: str
    recipe: dict[str, Any]
    recipe_sha256: str
    method: str = Field(description="label of the method, such as 'gptq 4-bit g64 sym act-order'")
    method_name: str
    format: str
    source: dict[str, Any]
    calibration: dict[str, Any] | None
    quantize_s: float = Field(description="wall seconds; a pass shared by several recipes counts whole for each")
    peak_rss_bytes: int = Field(description="of the process that quantized, all recipes of its pass together")
    tensors: list[TensorRecord]
    bits_per_weight: float | None = Field(description="of the quantized linears, from the bytes in the file")
    bits_per_weight_all: float = Field(description="of all parameters, from the bytes of the weight files")
    files: list[FileRecord]
    environment: dict[str, Any]
    inputs: list[FileRecord] = Field(
        default_factory=list,
        description="files beside model and text that numbers were taken from: importance matrices",
    )
    export: dict[str, Any] | None = Field(
        None, description="of an exported artifact: what it was made from, and how far it is from that"
    )
    manifest_sha256: str | None = Field(
        None, description="of the file's own bytes with 64 zeros in its place; None in schema version 1"
    )

    def fallbacks(self) -> list[str]:
        """A line for each linear that did not get what was asked, and why."""
        return [f"{record.name}: {record.applied}: {record.reason}" for record in self.tensors if record.reason]


def file_record(path: Path, root: Path) -> FileRecord:
    """Bytes and sha256 of a file, streamed."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    return FileRecord(name=path.relative_to(root).as_posix(), bytes=path.stat().st_size, sha256=digest.hexdigest())


def write_manifest(manifest: Manifest, folder: Path) -> Manifest:
    """Write quantkit.json into a folder: temporary file, fsync, rename. Returns it with its own hash."""
    text = manifest.model_copy(update={"manifest_sha256": _NO_HASH}).model_dump_json(indent=2) + "\n"
    own = hashlib.sha256(text.encode()).hexdigest()
    before, _, after = text.rpartition(_NO_HASH)  # the key is the last one
    write_atomic(folder / MANIFEST_NAME, f"{before}{own}{after}".encode())
    return manifest.model_copy(update={"manifest_sha256": own})


def own_hash_found(content: bytes, stated: str) -> str:
    """The sha256 that a manifest's bytes have, to be held against the one that it states."""
    before, _, after = content.rpartition(stated.encode())
    return hashlib.sha256(before + _NO_HASH.encode() + after).hexdigest()


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of an artifact, None when it has none. Raises ModelError when it is damaged.

    folder: that of the artifact, or its .gguf file, which the manifest has to name: others may lie beside it.
    """
    path = (folder if folder.is_dir() else folder.parent) / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes, expected {MAX_MANIFEST_BYTES} or fewer")
        found = Manifest.model_validate(json.loads(path.read_bytes()))
        return found if folder.is_dir() or folder.name in {record.name for record in found.files} else None
    except (ValueError, ValidationError, RecursionError) as error:
        first = str(error).splitlines()[0]
        raise ModelError(f"{path}: not a manifest that this version reads: {first}") from error


def partial_path(path: Path) -> Path:
    """Where this process makes what is to appear at `path` at once."""
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file's content at once: a reader sees the old or the new, never a part."""
    partial = partial_path(path)
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power loss."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
