"""The tensors of an artifact: those that the model needs, in the shapes and dtypes of the format, with sane values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantkit.errors import ModelError
from quantkit.formats.base import ArtifactSource
from quantkit.formats.folder import FLOATS, FolderArtifact
from quantkit.formats.gguf import GGUFArtifact
from quantkit.manifest import Manifest
from quantkit.model.blocks import is_buffer
from quantkit.model.load import expected_shapes
from quantkit.model.reader import SIDE_FILES, TOKENIZER_FILES, read_json_object
from quantkit.verification.files import check_json
from quantkit.verification.gguf import check_gguf
from quantkit.verification.report import Report


def check_tensors(artifact: ArtifactSource, manifest: Manifest | None, report: Report) -> None:
    """Names and shapes against the model's config, parts and values against the format, both against the manifest."""
    _check_names(artifact, report)
    for name in artifact.names():
        try:
            report.find(*artifact.problems(name))
        except ModelError as error:
            report.find(*error.message.split("\n"))
        report.count("tensors")
    if isinstance(artifact, FolderArtifact):
        _check_folder(artifact, manifest, report)
    elif isinstance(artifact, GGUFArtifact):
        check_gguf(artifact, report)
    if manifest is not None:
        _check_manifest(artifact, manifest, report)


def _check_names(artifact: ArtifactSource, report: Report) -> None:
    try:
        expected = expected_shapes(artifact)
    except ModelError as error:
        report.skip(f"names and shapes of tensors: {error.message}")
        return
    names = [name for name in artifact.names() if not is_buffer(name)]
    if artifact.tied_head and "lm_head.weight" in names:
        names.remove("lm_head.weight")  # some tools store the embedding twice
    present = set(names)
    report.find(
        *(f"{name}: missing, expected {list(shape)}" for name, shape in expected.items() if name not in present)
    )
    for name in names:
        if name not in expected:
            report.find(f"{name}: stray tensor, expected none of this name in the model")
            continue
        try:
            shape = tuple(artifact.shape(name))
        except (ModelError, ValueError) as error:
            report.find(f"{name}: its shape cannot be told: {error}")
            continue
        if shape != expected[name]:
            report.find(f"{name}: found {list(shape)}, expected {list(expected[name])} by config.json")


def _check_folder(artifact: FolderArtifact, manifest: Manifest | None, report: Report) -> None:
    """Dtypes of what is not quantized, and the files beside the weights."""
    model = manifest.recipe.get("model") if manifest else None
    dtype = model.get("dtype") if isinstance(model, dict) else None
    wanted = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}.get(str(dtype))
    for name in artifact.names():
        if artifact.is_quantized(name) or is_buffer(name):
            continue
        found = artifact.entry(name).dtype
        if (found != wanted) if wanted else (found not in FLOATS):
            report.find(f"{name}: found {found}, expected {wanted or ' or '.join(FLOATS)}")
    folder = artifact.path
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        report.find(f"{folder}: found no tokenizer, expected one of {', '.join(TOKENIZER_FILES)}")
    check_json(folder, [name for name in (*SIDE_FILES, "quantize_config.json") if name.endswith(".json")], report)
    _check_twin(folder, artifact.quantization, report)


def _check_twin(folder: Path, quantization: Any, report: Report) -> None:
    """quantize_config.json says what config.json says, for readers that look at one of them."""
    if not (folder / "quantize_config.json").is_file():
        return
    try:
        twin = read_json_object(folder / "quantize_config.json")
    except ModelError:
        return  # found already
    for key in ("bits", "group_size", "desc_act", "sym", "checkpoint_format"):
        if key in twin and key in quantization and twin[key] != quantization[key]:
            report.find(f"quantize_config.json: {key}: found {twin[key]}, expected {quantization[key]} by config.json")


def _check_manifest(artifact: ArtifactSource, manifest: Manifest, report: Report) -> None:
    """Format and records of the manifest against what is stored."""
    if manifest.format != artifact.format_name:
        report.find(f"{artifact.path}: found format {artifact.format_name}, expected {manifest.format} by the manifest")
        return
    names = set(artifact.names())
    for record in manifest.tensors:
        name = f"{record.name}.weight"
        if name not in names:
            report.find(f"{name}: missing, expected {record.applied} by the manifest")
            continue
        found = _stored_as(artifact, name)
        wanted = record.applied.split()[1] if isinstance(artifact, GGUFArtifact) and " " in record.applied else None
        plain = record.applied == "unquantized"
        if (wanted and found != wanted) or (not wanted and plain == (found == "codes")):
            report.find(f"{name}: found {found}, expected {record.applied} by the manifest")


def _stored_as(artifact: ArtifactSource, name: str) -> str:
    if isinstance(artifact, GGUFArtifact):
        return artifact.info(name).type_name
    assert isinstance(artifact, FolderArtifact)
    return "codes" if artifact.is_quantized(name) else "unquantized"
