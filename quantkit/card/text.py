"""What a card says: front matter for the hub, then what the artifact is, how good, how to load it, how it was made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import yaml

from quantkit.card.licence import Licence
from quantkit.card.loading import Loading, loadings_of
from quantkit.manifest import Manifest, weight_bytes
from quantkit.report.markdown import escaped

BEGIN, END = "<!-- measured -->", "<!-- /measured -->"
"""What stands between them is the table of results; `fill_card` replaces it and keeps the rest."""

NOT_MEASURED = "Not measured yet."
CARRIED = ("language", "pipeline_tag")
"""What is true of a quantized model as of its source, beside the licence."""

LIBRARIES = {"gguf": "gguf"}  # any other format is a folder that transformers loads


def card_text(manifest: Manifest, card: Mapping[str, Any], licence: Licence) -> str:
    """The whole card. card: the source's own fields, its hub id as base_model among them where it has one."""
    head = yaml.safe_dump(_front_matter(manifest, card, licence), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{head}---",
        f"# {escaped(_model(manifest))}, {escaped(manifest.method)}",
        _lead(manifest, card),
        _table(manifest),
        *_layers(manifest),
        f"## Measured\n\n{BEGIN}\n{NOT_MEASURED}\n{END}",
        *_loading(manifest),
        "## Recipe\n\n`quantkit quantize` makes it again from this file:\n\n"
        f"```yaml\n{yaml.safe_dump(_recipe(manifest), sort_keys=False, allow_unicode=True)}```",
        f"## Licence\n\n{licence.said}",
    ]
    return "\n\n".join(parts) + "\n"


def _recipe(manifest: Manifest) -> dict[str, Any]:
    """The recipe as it was applied: a model that came from a hub is named in it, at its commit."""
    source = manifest.source
    if not source.get("revision"):
        return manifest.recipe
    return {
        **manifest.recipe,
        "model": {**manifest.recipe["model"], "id": source["id"], "revision": source["revision"]},
    }


def _model(manifest: Manifest) -> str:
    return str(manifest.source["id"]).rpartition("/")[2].removesuffix(".gguf")


def _front_matter(manifest: Manifest, card: Mapping[str, Any], licence: Licence) -> dict[str, Any]:
    base = card.get("base_model")
    lineage = {"base_model": base, "base_model_relation": "quantized"} if base else {}
    method = manifest.recipe["method"]
    bits = f"{method['bits']}-bit" if "bits" in method else None
    tags = ["quantkit", manifest.method_name, manifest.format, bits]
    return {
        **lineage,
        "library_name": LIBRARIES.get(manifest.format, "transformers"),
        **licence.fields,
        **{key: card[key] for key in CARRIED if card.get(key)},
        "tags": list(dict.fromkeys(tag for tag in tags if tag)),
    }


def _lead(manifest: Manifest, card: Mapping[str, Any]) -> str:
    base = card.get("base_model")
    name = f"[{base}](https://huggingface.co/{base})" if base else f"`{manifest.source['id']}`"
    text = f"{name}, quantized by quantkit {manifest.quantkit_version}: {manifest.method}, as `{manifest.format}`."
    if not base:
        text += " The source was a file or folder that does not tell its id on the hub."
    return text


def _table(manifest: Manifest) -> str:
    source, method, calibration = manifest.source, manifest.recipe["method"], manifest.calibration
    rows = [("source", f"`{source['id']}`" + (f" at `{source['revision']}`" if source.get("revision") else ""))]
    rows += [("of the source", note) for note in source.get("notes", ())]
    rows.append(("method", escaped(manifest.method)))
    rows += [(key.replace("_", " "), _setting(key, method[key])) for key in _SHOWN if key in method]
    rows.append(("format", f"`{manifest.format}`"))
    if calibration is None:
        rows.append(("calibration", "none"))
    else:
        size = f"{calibration['sequences']} × {calibration['length']} tokens"
        rows.append(("calibration", f"`{calibration['set']}`, {size}, ids `{calibration['fingerprint'][:16]}`"))
    if manifest.bits_per_weight is not None:
        rows.append(("bits per weight, quantized layers", f"{manifest.bits_per_weight:.2f}"))
    rows.append(("bits per weight, whole file", f"{manifest.bits_per_weight_all:.2f}"))
    rows.append(("weights", f"{weight_bytes(manifest.files):,} bytes"))
    rows.append(("made by", f"quantkit {manifest.quantkit_version}"))
    lines = ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows)]
    return "\n".join(["## What it is", "", *lines, "", "`quantkit.json` has the hash of every file and of the source."])


_SHOWN = ("bits", "type", "group_size", "block_size")


def _setting(key: str, value: Any) -> str:
    return "whole row" if key == "group_size" and value is None else str(value)


def _layers(manifest: Manifest) -> list[str]:
    """What was left as it is, and what did not get what was asked; layers of one role share a line."""
    lines = []
    left = Counter(_role(record.name) for record in manifest.tensors if record.applied == "unquantized")
    lines += [f"- {escaped(role)}{_times(count)}: not quantized" for role, count in left.items()]
    fallen = Counter((_role(r.name), r.applied, r.reason) for r in manifest.tensors if r.reason)
    lines += [
        f"- {escaped(role)}{_times(count)}: {escaped(applied)}: {escaped(str(reason))}"
        for (role, applied, reason), count in fallen.items()
    ]
    return ["## Layers that are not as the rest\n\n" + "\n".join(lines)] if lines else []


def _role(name: str) -> str:
    return ".".join("N" if part.isdecimal() else part for part in name.split("."))


def _times(count: int) -> str:
    return f" ({count})" if count > 1 else ""


def _loading(manifest: Manifest) -> list[str]:
    loadings = loadings_of(manifest)
    if not loadings:
        return []
    file = next((record.name for record in manifest.files if record.name.endswith(".gguf")), "")
    place = "" if file else " `ARTIFACT` is this folder, or its id on the hub."
    return [f"## How to load it\n\nThe engines that read this format.{place}", *(_one(it, file) for it in loadings)]


def _one(loading: Loading, file: str) -> str:
    before = [f"`{loading.install}`" if loading.install else "", loading.note or ""]
    said = "; ".join(part for part in before if part)
    code = loading.code.rstrip("\n").replace("FILE", file)
    return f"### {loading.engine}\n\n" + (f"{said}\n\n" if said else "") + f"```{loading.language}\n{code}\n```"
