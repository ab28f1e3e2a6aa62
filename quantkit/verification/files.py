"""The files of an artifact against its manifest, and the manifest against its own hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from quantkit.errors import ModelError
from quantkit.manifest import MANIFEST_NAME, FileRecord, Manifest, own_hash_found, read_manifest
from quantkit.model.reader import is_side_file, read_json_object
from quantkit.verification.report import Report

ENGINE_FILES = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".py", ".json")
"""Endings of files that an engine reads from a model's folder, or runs: one that no manifest lists is a finding."""

THREADS = 2
"""Files that are hashed at once: hashing takes longer than reading from a fast disk."""


def check_files(path: Path, report: Report) -> Manifest | None:
    """Hash every file of an artifact. Returns its manifest, None when there is none or it cannot be read."""
    folder = path if path.is_dir() else path.parent
    try:
        manifest = read_manifest(folder)
    except ModelError as error:
        report.find(*error.message.split("\n"))
        return None
    if manifest is None:
        report.skip("hashes: there is no quantkit.json, so nothing says what the bytes should be")
        return None
    _check_manifest(folder / MANIFEST_NAME, manifest, report)
    if path.is_file() and path.name not in {record.name for record in manifest.files}:
        report.skip(f"hashes: the {MANIFEST_NAME} beside {path.name} does not list it")
        return None
    records = manifest.files
    if path.is_file():
        records = [record for record in records if record.name == path.name]
        if len(manifest.files) > 1:
            report.skip(f"{len(manifest.files) - 1} files beside {path.name}: give the folder to check them too")
    _check_records(folder, records, report)
    if path.is_dir():
        _check_strays(folder, {record.name for record in records}, report)
    return manifest


def _check_manifest(file: Path, manifest: Manifest, report: Report) -> None:
    """The manifest's own hash."""
    stated = manifest.manifest_sha256
    if stated is None:
        if manifest.schema_version > 1:
            report.find(f"{file}: manifest_sha256: found none, expected one in schema version 2")
        else:
            report.skip(f"{file}: its own bytes: schema version 1 has no hash of them")
        return
    found = own_hash_found(file.read_bytes(), stated)
    if found != stated:
        report.find(f"{file}: found sha256 {found}, expected {stated} by its manifest_sha256")
    report.count("files")


def _check_records(folder: Path, records: Iterable[FileRecord], report: Report) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        for lines in pool.map(lambda record: _record_problems(folder, record), records):
            report.find(*lines)
            report.count("files")


def _record_problems(folder: Path, record: FileRecord) -> list[str]:
    path, parts = folder / record.name, PurePosixPath(record.name)
    if parts.is_absolute() or ".." in parts.parts:
        return [f"{folder / MANIFEST_NAME}: files: found {record.name!r}, expected names inside the folder"]
    try:
        size = path.stat().st_size
        if size != record.bytes:
            return [f"{path}: found {size} bytes, expected {record.bytes}"]
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        return [f"{path}: cannot be read: {error}"]
    return [] if found == record.sha256 else [f"{path}: found sha256 {found}, expected {record.sha256}"]


def _check_strays(folder: Path, known: set[str], report: Report) -> None:
    """Files that no manifest lists: what an engine would read is wrong, a user's own notes are not."""
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_dir() or name in known or name == MANIFEST_NAME:
            continue
        at_top = "/" not in name
        if at_top and (file.suffix in ENGINE_FILES or is_side_file(file.name)):
            report.find(f"{file}: found a file that engines read, expected only those that {MANIFEST_NAME} lists")
        else:
            report.note(f"{name}: not part of the artifact")


def check_json(folder: Path, names: Iterable[str], report: Report) -> None:
    """Side files that have to be JSON."""
    for name in names:
        if (folder / name).is_file():
            try:
                read_json_object(folder / name)
            except ModelError as error:
                report.find(*error.message.split("\n"))
