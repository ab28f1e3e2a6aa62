"""quantkit.json: what an artifact is, what it was made from, and the hash of every file beside it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from quantkit.errors import ModelError
from quantkit.schema import Frozen

MANIFEST_NAME = "quantkit.json"
MANIFEST_SCHEMA_VERSION = 1


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

    def fallbacks(self) -> list[str]:
        """A line for each linear that did not get what was asked, and why."""
        return [f"{record.name}: {record.applied}: {record.reason}" for record in self.tensors if record.reason]


def file_record(path: Path, root: Path) -> FileRecord:
    """Bytes and sha256 of a file, read once in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return FileRecord(name=path.relative_to(root).as_posix(), bytes=path.stat().st_size, sha256=digest.hexdigest())


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write quantkit.json into a folder: temporary file, fsync, rename."""
    write_atomic(folder / MANIFEST_NAME, (manifest.model_dump_json(indent=2) + "\n").encode())


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of an artifact, None when it has none. Raises ModelError when it is damaged.

    folder: that of the artifact, or its .gguf file, which the manifest has to name: others may lie beside it.
    """
    path = (folder if folder.is_dir() else folder.parent) / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        found = Manifest.model_validate(json.loads(path.read_text()))
        return found if folder.is_dir() or folder.name in {record.name for record in found.files} else None
    except (ValueError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise ModelError(f"{path}: not a manifest that this version reads: {first}") from error


def check_files(manifest: Manifest, folder: Path) -> list[str]:
    """Every way in which the files of an artifact are not those of its manifest, one line each; none when they are."""
    problems = []
    for record in manifest.files:
        path = folder / record.name
        if Path(record.name).is_absolute() or ".." in Path(record.name).parts:
            problems.append(f"{record.name}: outside the artifact's folder")
        elif not path.is_file():
            problems.append(f"{record.name}: missing")
        elif (found := file_record(path, folder)) != record:
            what = f"{found.bytes} bytes" if found.bytes != record.bytes else f"sha256 {found.sha256[:16]}"
            wanted = f"{record.bytes}" if found.bytes != record.bytes else record.sha256[:16]
            problems.append(f"{record.name}: {what}, expected {wanted}")
    return problems


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file's content at once: a reader sees the old or the new, never a part."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
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
