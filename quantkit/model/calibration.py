"""Calibration sets as token ids: built once from a definition or a file, cached, known by their fingerprint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import DataError
from quantkit.model.calibration_sets import (
    CalibrationSource,
    Definition,
    Part,
    find_set,
    list_definitions,
    load_definition,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from quantkit.recipe import CalibrationSection

__all__ = [
    "CalibrationSet",
    "CalibrationSource",
    "Definition",
    "Part",
    "build",
    "fingerprint_of",
    "list_definitions",
    "load_calibration",
    "load_definition",
]

PACKING_VERSION = 1
"""Raised when the same texts become other ids, so that what the cache holds is made again."""

_NOT_OF_THE_IDS = {"precision"}
"""Keys of the calibration section that say nothing of the token ids."""

MAX_IDS_BYTES = 1_000_000_000  # 60 million tokens as text


@dataclass(frozen=True)
class CalibrationSet:
    """Packed text. ids: int64 [sequences, length]. fingerprint: sha256 of them, as `fingerprint_of` gives it.

    name: of the definition or file. definition: what the set is made of. tokenizer_sha256: of the tokenizer's files.
    """

    ids: Tensor
    fingerprint: str
    name: str
    part: Part
    definition: dict[str, Any]
    tokenizer_sha256: str | None = None


def fingerprint_of(ids: Tensor) -> str:
    """sha256 in hex of token ids [sequences, length] as little-endian int64, row after row."""
    return hashlib.sha256(ids.contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def load_calibration(
    section: CalibrationSection,
    tokenizer_folder: Path,
    part: Part = "calibration",
    *,
    trust_remote_code: bool = False,
) -> CalibrationSet:
    """The text a recipe calibrates on, or its held-out part, in a model's token ids; from the cache if they are there.

    A .json file with `ids`, as `build` writes it, is taken as it is. Raises DataError for a set that is unknown,
    damaged or too small, ModelError for a tokenizer that cannot be loaded.
    """
    from quantkit.model.sequences import ChatRenderer, load_tokenizer, pack, tokenizer_sha256

    ready = _read_ids_file(Path(section.set).expanduser())
    tokenizer_hash = tokenizer_sha256(tokenizer_folder)
    if ready is not None:
        tokenizer = load_tokenizer(tokenizer_folder, trust_remote_code=trust_remote_code)
        return _from_ids_file(ready, section, tokenizer, tokenizer_hash, part)
    source = find_set(section.set)
    cached = _cache_path(source, section, tokenizer_hash, part)
    known = _read_cached(cached, section) if cached else None
    if known is None:
        from quantkit.model.calibration_rows import documents

        tokenizer = load_tokenizer(tokenizer_folder, trust_remote_code=trust_remote_code)
        texts = documents(source, part, ChatRenderer(tokenizer, source.name))
        where = source.name if part == "calibration" else f"{source.name} (its evaluation part)"
        rows = pack(texts, tokenizer, section.sequences, section.length, section.seed, where)
        known = _tensor(rows)
        if cached:
            _write_cached(cached, known)
    definition = source.definition.model_dump(mode="json", exclude_defaults=True)
    return CalibrationSet(known, fingerprint_of(known), source.name, part, definition, tokenizer_hash)


def build(
    name_or_file: str,
    tokenizer_folder: Path,
    out_file: Path,
    sequences: int,
    length: int,
    seed: int,
    part: Part = "calibration",
) -> CalibrationSet:
    """Pack a set and write it as JSON with `ids` and `fingerprint`, which `calibration.set` takes in turn.

    Raises DataError, ModelError.
    """
    from quantkit.manifest import write_atomic
    from quantkit.recipe import CalibrationSection

    section = CalibrationSection(set=name_or_file, sequences=sequences, length=length, seed=seed)
    made = load_calibration(section, tokenizer_folder, part)
    document = {
        "set": made.name,
        "part": made.part,
        "section": section.model_dump(mode="json", exclude=_NOT_OF_THE_IDS),
        "definition": made.definition,
        "tokenizer_sha256": made.tokenizer_sha256,
        "fingerprint": made.fingerprint,
        "ids": made.ids.tolist(),
    }
    try:
        out_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out_file, (json.dumps(document) + "\n").encode())
    except OSError as error:
        raise DataError(f"{out_file}: cannot be written: {error.strerror}") from error
    return made


def _tensor(rows: list[list[int]]) -> Tensor:
    import torch

    return torch.tensor(rows, dtype=torch.int64)


def _cache_path(source: CalibrationSource, section: CalibrationSection, tokenizer_hash: str, part: Part) -> Path | None:
    """Where the ids of a set are kept; None when the set may hold other rows tomorrow under the same name."""
    from quantkit.resources import cache_folder

    content: Any
    if source.definition.hub:
        if not source.definition.hub.pinned:
            return None
        content = None
    elif source.definition.embedded:
        from quantkit.model.embedded_text import pydoc_documents

        content = hashlib.sha256(json.dumps(pydoc_documents()).encode()).hexdigest()
    else:
        content = [_file_sha256(path) for path in source.files(part)]
    key = {
        "version": PACKING_VERSION,
        "definition": source.definition.model_dump(mode="json"),
        "content": content,
        "tokenizer": tokenizer_hash,
        "section": section.model_dump(mode="json", exclude={"set", *_NOT_OF_THE_IDS}),
        "part": part,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "calibration" / f"{digest[:32]}.json"


def _file_sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _read_cached(path: Path, section: CalibrationSection) -> Tensor | None:
    """Cached ids, None when there are none or they are damaged: then they are made again."""
    try:
        document = json.loads(path.read_bytes())
        ids = _tensor(document["ids"])
        sound = ids.shape == (section.sequences, section.length) and document["fingerprint"] == fingerprint_of(ids)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, RecursionError):
        return None
    return ids if sound else None


def _write_cached(path: Path, ids: Tensor) -> None:
    from quantkit.manifest import write_atomic

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({"fingerprint": fingerprint_of(ids), "ids": ids.tolist()}).encode())
    except OSError:
        # a cache that cannot be written costs time, not results
        return


def _read_ids_file(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """The content of a .json file of token ids, None for anything else. Raises DataError when it is damaged."""
    if path.suffix != ".json" or not path.is_file():
        return None
    try:
        with path.open("rb") as stream:
            start = stream.read(4096).lstrip()
        if not start.startswith(b"{") or path.stat().st_size > MAX_IDS_BYTES:
            return None
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if b'"ids"' in start and b'"fingerprint"' in start:
            raise DataError(f"{path}: not JSON: {error}", hint="build it again") from error
        return None  # one object a line, for `datasets` to read
    return (path, document) if isinstance(document, dict) and "ids" in document else None


def _from_ids_file(
    file: tuple[Path, dict[str, Any]],
    section: CalibrationSection,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_hash: str,
    part: Part,
) -> CalibrationSet:
    """A set from ready token ids, its first `sequences` rows. Raises DataError when they do not fit what is asked."""
    path, document = file
    rows = document["ids"]
    if not (isinstance(rows, list) and rows and all(isinstance(row, list) and row for row in rows)):
        raise DataError(f"{path}: ids: expected a list of rows of token ids")
    length = len(rows[0])
    if any(len(row) != length or any(type(token) is not int for token in row) for row in rows):
        raise DataError(f"{path}: ids: expected rows of one length that hold integers")
    held_part = document.get("part", "calibration")
    if held_part != part:
        raise DataError(
            f"{path}: holds the {held_part} part, the {part} part is needed",
            hint=f"`quantkit calibration build ... --part {part}` makes it",
        )
    if length != section.length or len(rows) < section.sequences:
        raise DataError(
            f"{path}: holds {len(rows)} sequences of {length} tokens, the recipe asks for "
            f"{section.sequences} of {section.length}",
            hint=f"--set calibration.sequences={len(rows)} --set calibration.length={length}",
        )
    made_with = document.get("tokenizer_sha256")
    size = len(tokenizer)
    low, high = min(map(min, rows)), max(map(max, rows))
    if low < 0 or high >= size or (made_with is not None and made_with != tokenizer_hash):
        raise DataError(
            f"{path}: made with another tokenizer (ids {low} to {high}; the model's tokenizer has {size} entries)",
            hint="build it again with --model",
        )
    ids = _tensor(rows)
    if document.get("fingerprint", fingerprint_of(ids)) != fingerprint_of(ids):
        raise DataError(f"{path}: the ids do not have the fingerprint that the file states", hint="build it again")
    ids = ids[: section.sequences]
    definition = document.get("definition")
    if not isinstance(definition, dict):
        definition = {}
    return CalibrationSet(ids, fingerprint_of(ids), str(document.get("set", path.name)), part, definition, made_with)
