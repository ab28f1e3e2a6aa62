"""The documents of a calibration set, read through `datasets`: rows in, texts out, each in exactly one part."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantkit.errors import DataError, QuantkitError
from quantkit.model.calibration_sets import FILE_KINDS, CalibrationSource, HubSet, Part

HELD_OUT_SHARE = 0.1
"""Of the documents of a set that has no evaluation part of its own."""

SECTION_CHARACTERS = 4000
"""A long text is cut into documents of about 1,000 tokens, at blank lines: most sequences are then continuous text."""

SECTIONS_AT_LEAST = 20  # a short text is cut finer, so that a tenth of it can be held out

END_OF_TEXT = "<|endoftext|>"
"""A line of this separates documents in many published text files."""

MESSAGE_FIELDS = ("messages", "conversations")

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}

Render = Callable[[list[dict[str, Any]]], str]
"""Chat messages to the text that the model's chat template makes of them."""


def documents(source: CalibrationSource, part: Part, render: Render) -> list[str]:
    """The non-empty texts of one part, in the order of the set; the two parts share none. Raises DataError."""
    definition = source.definition
    if definition.embedded:
        return _embedded(part)
    if definition.hub:
        own_part = part == "evaluation" and definition.hub.evaluation_split is not None
        split = definition.hub.evaluation_split if own_part else definition.hub.split
        where = f"{definition.hub.id}, split {split}"
        texts = _texts(_hub_rows(definition.hub, str(split)), source, where, render)
        separate = definition.hub.evaluation_split is not None
    else:
        texts = []
        for path in source.files(part):
            texts += _file_texts(path, source, render)
        separate = bool(definition.evaluation_files)
        where = source.name
    if not texts:
        raise DataError(f"{where}: holds no text", hint="expected rows with text or chat messages")
    if separate:
        return texts
    held_out = _held_out(texts)
    if part == "evaluation" and not held_out:
        raise DataError(
            f"{where}: holds a single document, so none can be held out for evaluation",
            hint="separate documents by blank lines, or take another set for evaluation",
        )
    return [text for text in texts if (text in held_out) == (part == "evaluation")]


def _held_out(texts: Sequence[str]) -> set[str]:
    """A tenth of the different texts, by the order of their sha256: no seed, order or duplicate moves a text over."""
    different = sorted(set(texts), key=lambda text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    if len(different) < 2:
        return set()
    return set(different[: max(1, round(HELD_OUT_SHARE * len(different)))])


def _embedded(part: Part) -> list[str]:
    from datasets import Dataset

    from quantkit.model.embedded_text import pydoc_documents

    calibration, evaluation = pydoc_documents()
    rows = Dataset.from_dict({"text": calibration if part == "calibration" else evaluation})
    return list(rows["text"])


def _file_texts(path: Path, source: CalibrationSource, render: Render) -> list[str]:
    kind = FILE_KINDS[path.suffix]
    if not path.is_file():
        raise DataError(f"{path}: no such file", hint=f"it is named by the calibration set {source.name}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    with _explained(str(path)):
        from datasets import load_dataset

        # streamed: `datasets` would copy the file into its cache otherwise, and the token ids are what is kept
        options = {"sample_by": "document"} if kind == "text" else {}
        rows = load_dataset(kind, data_files=str(path), split="train", streaming=True, **options)
    if kind == "text":
        return [text for row in _guarded(rows, str(path)) for text in cut_text(row["text"])]
    return _texts(rows, source, str(path), render)


def _hub_rows(hub: HubSet, split: str) -> Iterable[Mapping[str, Any]]:
    from quantkit.resources import cache_folder

    where = f"{hub.id} (revision {hub.revision}, split {split})"
    with _explained(where), _no_progress_bars():
        from datasets import load_dataset_builder

        cache = str(cache_folder() / "datasets")
        builder = load_dataset_builder(hub.id, name=hub.config, revision=hub.revision, cache_dir=cache)
        if hub.pinned and builder.hash != hub.revision:
            # without network `datasets` takes whatever commit it has
            raise DataError(
                f"{where}: the hub cannot be reached, and the cache holds another commit: {builder.hash}",
                hint="unset HF_HUB_OFFLINE and check the network, or take that commit in a definition of your own",
            )
        if hub.rows is not None:
            return builder.as_streaming_dataset(split=split).take(hub.rows)  # type: ignore[no-any-return]
        builder.download_and_prepare()
        return builder.as_dataset(split=split)  # type: ignore[no-any-return]


def _guarded(rows: Iterable[Mapping[str, Any]], where: str) -> Iterator[Mapping[str, Any]]:
    """The rows, with what goes wrong while they are read told as a DataError."""
    with _explained(where), _no_progress_bars():
        yield from rows


@contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except (QuantkitError, MemoryError):
        raise
    except Exception as error:  # `datasets` passes on what a dozen libraries raise
        import datasets
        from huggingface_hub import constants

        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        lines = [line.strip() for line in str(cause or error).splitlines() if line.strip()]
        said = f"{type(cause or error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
        if Path(where).exists():
            hint = "expected one JSON object a line, a JSON array, a Parquet table or UTF-8 text, by the file's suffix"
        elif constants.HF_HUB_OFFLINE:
            hint = "HF_HUB_OFFLINE is set: unset it, or take a local file or the set pydoc, which need no network"
        elif isinstance(error, datasets.exceptions.DatasetNotFoundError):
            hint = "check id and revision in its definition; a private or gated set needs HF_TOKEN"
        elif isinstance(error, ValueError):
            hint = "check config and split in its definition"
        else:
            hint = "check the network and HF_ENDPOINT; a local file or the set pydoc need no network"
        raise DataError(f"{where}: cannot be read: {said}", hint=hint) from error


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    import datasets

    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _texts(rows: Iterable[Mapping[str, Any]], source: CalibrationSource, where: str, render: Render) -> list[str]:
    """The text of every row that has one."""
    definition = source.definition
    field, is_chat = definition.text_field or definition.messages_field, definition.messages_field is not None
    texts: list[str] = []
    for number, row in enumerate(_guarded(rows, where)):
        if field is None:
            field, is_chat = _field_of(row, where)
        if field not in row:
            raise DataError(f"{where}: row {number}: no column {field}; found {', '.join(row)}")
        value = row[field]
        if value is None:
            continue
        if is_chat:
            texts.append(render(_messages(value, f"{where}: row {number}: {field}")))
        elif isinstance(value, str):
            texts.append(value)
        else:
            raise DataError(f"{where}: row {number}: {field}: found a {type(value).__name__}, expected text")
    if definition.document_start:
        texts = _articles(texts, re.compile(definition.document_start))
    return [text for text in texts if text.strip()]


def _field_of(row: Mapping[str, Any], where: str) -> tuple[str, bool]:
    if "text" in row:
        return "text", False
    for name in MESSAGE_FIELDS:
        if name in row:
            return name, True
    raise DataError(
        f"{where}: expected a column text, {' or '.join(MESSAGE_FIELDS)}; found {', '.join(row)}",
        hint="a definition of your own (.yaml with files and text_field or messages_field) can name another column",
    )


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    """Messages with role and content, also from rows that say from and value."""
    made = []
    for message in value if isinstance(value, list) else [None]:
        if not isinstance(message, Mapping):
            raise DataError(f"{where}: expected a list of messages with role and content")
        role = message.get("role") or message.get("from")
        content = message.get("content") if message.get("content") is not None else message.get("value")
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(f"{where}: found a message with {', '.join(message)}, expected role and content")
        made.append({"role": _ROLES.get(role, role), "content": content})
    if not made:
        raise DataError(f"{where}: no messages")
    return made


def _articles(lines: Iterable[str], start: re.Pattern[str]) -> list[str]:
    """Lines gathered into documents; one begins at each line that matches."""
    articles: list[list[str]] = []
    for line in lines:
        if start.search(line) or not articles:
            articles.append([])
        if line.strip():
            articles[-1].append(line.strip())
    return ["\n\n".join(article) for article in articles]


def cut_text(text: str) -> list[str]:
    """A text file's documents: between lines of `<|endoftext|>`, else sections of whole paragraphs (or lines)."""
    marked = re.split(rf"^\s*{re.escape(END_OF_TEXT)}\s*$", text, flags=re.MULTILINE)
    if len(marked) > 1:
        return [part.strip() for part in marked if part.strip()]
    pieces = [piece for piece in re.split(r"\n\s*\n", text) if piece.strip()]
    glue = "\n\n"
    if len(pieces) == 1:
        pieces, glue = [line for line in text.splitlines() if line.strip()], "\n"
    wanted = min(SECTION_CHARACTERS, len(text) // SECTIONS_AT_LEAST)
    sections: list[list[str]] = []
    size = wanted
    for piece in pieces:
        if size >= wanted:
            sections.append([])
            size = 0
        sections[-1].append(piece.strip())
        size += len(piece)
    return [glue.join(section) for section in sections]
