"""What the GGUF format asks of a file beside its tensors' values: places, padding, keys, tokenizer."""

from __future__ import annotations

from typing import Any

from quantkit.formats.gguf import GGUFArtifact
from quantkit.formats.gguf_metadata import QUANTIZATION_VERSION
from quantkit.maths.ggml import FLOAT_TYPES
from quantkit.model.gguf_file import DEFAULT_ALIGNMENT, GGUFFile
from quantkit.verification.report import Report

NAME_BYTES = 64
"""Of a tensor at most. Source: ggml.h, GGML_MAX_NAME."""


def check_gguf(artifact: GGUFArtifact, report: Report) -> None:
    file = artifact.file
    _check_places(file, report)
    _check_tokenizer(artifact, report)
    quantized = [info.name for info in file.tensors.values() if info.type_name not in FLOAT_TYPES]
    version = file.metadata.get("general.quantization_version")
    if quantized and version != QUANTIZATION_VERSION:
        report.find(f"general.quantization_version: found {version}, expected {QUANTIZATION_VERSION}")
    for name in ("file_type", "name"):
        if f"general.{name}" not in file.metadata:
            report.note(f"general.{name}: not in the header")
    unknown = [name for name in file.tensors if len(name.encode()) >= NAME_BYTES]
    report.find(*(f"{name}: found a name of {len(name.encode())} bytes, expected {NAME_BYTES - 1}" for name in unknown))


def _check_places(file: GGUFFile, report: Report) -> None:
    """Tensors begin at multiples of the alignment, one after the other; the bytes between them are zeros."""
    alignment = int(file.metadata.get("general.alignment", DEFAULT_ALIGNMENT))
    at = file.data_start
    for info in sorted(file.tensors.values(), key=lambda info: info.start):
        if (info.start - file.data_start) % alignment:
            report.find(
                f"{info.name}: begins at byte {info.start}, expected a multiple of {alignment} behind the header"
            )
        between = file.bytes_at(at, info.start)
        if len(between) >= alignment:
            report.find(f"{info.name}: begins at byte {info.start}, expected {at} or the next multiple of {alignment}")
        elif any(between):
            report.find(f"{info.name}: found bytes set in the padding before it, expected zeros")
        at = info.start + info.size
    rest = file.bytes_at(at, file.size)
    if len(rest) >= alignment or any(rest):
        report.find(f"{file.path}: found {len(rest)} bytes behind the last tensor, expected padding of zeros")


def _check_tokenizer(artifact: GGUFArtifact, report: Report) -> None:
    metadata: dict[str, Any] = artifact.file.metadata
    tokens = metadata.get("tokenizer.ggml.tokens")
    if tokens is None:
        report.find("tokenizer.ggml.tokens: missing, expected the vocabulary")
        return
    rows = artifact.config["vocab_size"]
    if len(tokens) > rows:
        report.find(f"tokenizer.ggml.tokens: found {len(tokens)} tokens, expected {rows} or fewer: rows of token_embd")
    for key in ("token_type", "scores"):
        values = metadata.get(f"tokenizer.ggml.{key}")
        if values is not None and len(values) != len(tokens):
            report.find(f"tokenizer.ggml.{key}: found {len(values)} values, expected {len(tokens)}")
    for role in ("bos", "eos", "unknown", "padding", "eot"):
        number = metadata.get(f"tokenizer.ggml.{role}_token_id")
        if number is not None and not 0 <= number < len(tokens):
            report.find(f"tokenizer.ggml.{role}_token_id: found {number}, expected 0 to {len(tokens) - 1}")
