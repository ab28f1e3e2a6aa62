"""What an artifact is, from its own bytes: format, bits per weight, tensors, and the manifest where there is one."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import ModelError

if TYPE_CHECKING:
    from quantkit.formats.base import ArtifactSource
    from quantkit.manifest import Manifest

FULL_BITS = 16
"""A stored tensor with fewer bits a value than this is a quantized one: the smallest unquantized dtype is float16."""


def inspect(path: Path) -> dict[str, Any]:
    """The facts of an artifact by quantkit or by another tool, from headers and file sizes; no weight is decoded.

    Keys: artifact, format, method (None when neither the manifest nor the file tells), bits_per_weight (of the
    quantized linears, None when there are none), bits_per_weight_all (of all parameters, from the bytes of the weight
    files), parameters, weight_bytes, quantization (the file's own settings), tensors [{name, shape, bits_per_weight,
    bytes, quantized, and for linears with a manifest requested, applied, sqnr_db, reason}], files [{name, bytes}],
    lineage (the manifest without tensors and files, or None).
    Raises ModelError when there is no artifact or it is damaged.
    """
    from quantkit.formats import open_artifact
    from quantkit.manifest import WEIGHT_FILES, read_manifest

    source = open_artifact(path)
    manifest = read_manifest(path)
    tensors = _tensors(source, manifest)
    linears = [tensor for tensor in tensors if tensor["quantized"] and tensor["name"] != _embedding(source)]
    files = _files(path)
    weight_bytes = sum(file["bytes"] for file in files if file["name"].endswith(WEIGHT_FILES))
    parameters = source.parameter_count()
    return {
        "artifact": path.name,
        "format": source.format_name,
        "method": manifest.method if manifest else method_label(source.quantization),
        "bits_per_weight": _bits(linears),
        "bits_per_weight_all": weight_bytes * 8 / parameters,
        "parameters": parameters,
        "weight_bytes": weight_bytes,
        "quantization": _plain(source.quantization),
        "tensors": tensors,
        "files": files,
        "lineage": manifest.model_dump(mode="json", exclude={"tensors", "files"}) if manifest else None,
    }


def method_label(quantization: Mapping[str, Any]) -> str | None:
    """A label such as "gptq 4-bit g128 sym act-order" from a reader's own settings, None when they name no method.

    quantization: a quantization_config, or {"type": ...} of a GGUF file.
    """
    if "type" in quantization:
        return f"gguf {quantization['type']}"
    name = quantization.get("quant_method")
    if name is None:
        return None
    words = [str(name)]
    if quantization.get("load_in_8bit"):
        words.append("int8")
    elif quantization.get("load_in_4bit"):
        words.append(str(quantization.get("bnb_4bit_quant_type", "fp4")))  # the library's own default
        words += ["double"] if quantization.get("bnb_4bit_use_double_quant") else []
    bits, size = quantization.get("bits"), quantization.get("group_size")
    words += [f"{bits}-bit"] if bits else []
    words += ["row" if size == -1 else f"g{size}"] if size else []
    symmetric = quantization.get("sym", None if "zero_point" not in quantization else not quantization["zero_point"])
    words += [] if symmetric is None else ["sym" if symmetric else "asym"]
    words += ["act-order"] if quantization.get("desc_act") else []
    groups = quantization.get("config_groups")
    words += [" + ".join(_group_label(group["weights"]) for group in groups.values())] if groups else []
    return " ".join(words)


def _group_label(weights: Mapping[str, Any]) -> str:
    """The label of a config group of compressed-tensors."""
    size = weights.get("group_size")
    row = size in (None, -1)
    symmetry = "sym" if weights["symmetric"] else "asym"
    order = " act-order" if weights.get("actorder") else ""
    return f"{weights['num_bits']}-bit {'row' if row else f'g{size}'} {symmetry}{order}"


def _tensors(source: ArtifactSource, manifest: Manifest | None) -> list[dict[str, Any]]:
    records = {record.name: record for record in manifest.tensors} if manifest else {}
    tensors = []
    for name in source.names():
        shape = source.shape(name)
        stored = source.stored_bytes(name)
        bits = stored * 8 / max(prod(shape), 1)
        tensor = {
            "name": name,
            "shape": list(shape),
            "bits_per_weight": bits,
            "bytes": stored,
            "quantized": len(shape) == 2 and bits < FULL_BITS,
        }
        record = records.get(name.removesuffix(".weight"))
        if record is not None:
            tensor |= record.model_dump(include={"requested", "applied", "sqnr_db", "reason"})
        tensors.append(tensor)
    return tensors


def _embedding(source: ArtifactSource) -> str | None:
    """The matrix that is no linear, None in a family that quantkit has no layout for: all matrices count there."""
    from quantkit.model.blocks import architecture_of

    try:
        return f"{architecture_of(source.config).embedding}.weight"
    except ModelError:
        return None


def _bits(tensors: list[dict[str, Any]]) -> float | None:
    values = sum(prod(tensor["shape"]) for tensor in tensors)
    return sum(tensor["bytes"] for tensor in tensors) * 8 / values if values else None


def _files(path: Path) -> list[dict[str, Any]]:
    if path.is_file():
        return [{"name": path.name, "bytes": path.stat().st_size}]
    found = sorted(file for file in path.rglob("*") if file.is_file())
    return [{"name": file.relative_to(path).as_posix(), "bytes": file.stat().st_size} for file in found]


def _plain(value: Any) -> Any:
    """A value as JSON holds it: GGUF metadata comes in numpy's types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return value.item() if hasattr(value, "item") else str(value)
