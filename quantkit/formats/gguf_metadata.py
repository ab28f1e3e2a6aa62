"""What a GGUF file says of a model beside its tensors: architecture, tokenizer, name and licence, from any source."""

from __future__ import annotations

from typing import Any

from quantkit.formats.gguf_vocabulary import tokenizer_metadata
from quantkit.manifest import read_manifest
from quantkit.model.gguf_config import family_of_config, metadata_of_config
from quantkit.model.gguf_source import GGUFSource
from quantkit.model.source import Source

QUANTIZATION_VERSION = 2


def file_metadata(source: Source, rows: int, file_type: str) -> dict[str, Any]:
    """Every key of the file but general.architecture, with its value.

    rows: of the embedding matrix. file_type: ggml's name of the type that most linears have. Raises ModelError when the
    config or the tokenizer cannot be said in GGUF.
    """
    architecture = family_of_config(source.config).architecture
    values = general_metadata(source, file_type)
    values.update({f"{architecture}.{key}": value for key, value in metadata_of_config(source.config).items()})
    general = {**values, "general.architecture": architecture}
    values.update(tokenizer_metadata(source.tokenizer_folder(), source.config, rows, general))
    return values


def general_metadata(source: Source, file_type: str) -> dict[str, Any]:
    """The general.* keys: what the model is called, how large it is, under which licence, in which types."""
    from gguf.constants import LlamaFileType
    from gguf.utility import model_weight_count_rounded_notation

    values: dict[str, Any] = {"general.type": "model", "general.name": model_name(source)}
    values["general.size_label"] = model_weight_count_rounded_notation(source.parameter_count())
    if isinstance(source, GGUFSource):
        kept = ("name", "basename", "finetune", "organization", "license", "languages", "size_label")
        found = {f"general.{key}": source.file.metadata.get(f"general.{key}") for key in kept}
        values.update({key: value for key, value in found.items() if value})
    else:
        licence = source.card().get("license")
        if isinstance(licence, str):
            values["general.license"] = licence
    number = LlamaFileType.ALL_F32 if file_type == "F32" else LlamaFileType[f"MOSTLY_{file_type}"]
    values["general.file_type"] = int(number)
    values["general.quantization_version"] = QUANTIZATION_VERSION
    return values


def model_name(source: Source) -> str:
    """What the model is called: the folder's or file's name without hashes and types; of an artifact, its model's."""
    manifest = read_manifest(source.path) if source.kind == "artifact" else None
    if manifest is not None and manifest.source.get("id"):
        name = str(manifest.source["id"]).rpartition("/")[2]  # a hub id has its owner before it
    elif source.path.is_dir():
        if source.path.parent.name == "snapshots":  # the hub's cache: models--ORGANIZATION--NAME/snapshots/HASH
            return source.path.parent.parent.name.rpartition("--")[2]
        return source.path.resolve().name
    else:
        name = source.path.name
    if not name.endswith(".gguf"):
        return name
    name = name.removesuffix(".gguf")
    for ending in _type_names(source):
        if name.upper().endswith((f".{ending}", f"-{ending}", f"_{ending}")):
            return name[: -len(ending) - 1]
    return name


def _type_names(source: Source) -> list[str]:
    """What files are called by their types: llama.cpp's names of types and mixes, the longest first, and the source's
    most usual type."""
    from gguf.constants import LlamaFileType

    names = {kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in LlamaFileType}
    if isinstance(source, GGUFSource):
        names.add(source.main_type)
    return sorted(names, key=lambda name: (-len(name), name))
