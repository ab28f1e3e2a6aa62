"""What the verbs say on a terminal: plain aligned text, so that a pipe gets the same. Numbers are for --json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantkit.manifest import Manifest
    from quantkit.recipe import Shipped

FALLBACKS_SHOWN = 8


def columns(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Rows as aligned columns, two blanks apart; `right` are the columns that are set flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))] if rows else []
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def megabytes(count: int) -> str:
    """A number of bytes in decimal megabytes, or gigabytes from 10 GB on."""
    return f"{count / 1e9:.1f} GB" if count >= 10e9 else f"{count / 1e6:.1f} MB"


def manifest(made: Manifest) -> str:
    """What quantize made: sizes, bits, loss, and every layer that did not get what was asked."""
    quantized = [record for record in made.tensors if record.applied != "unquantized"]
    noise = sorted(record.sqnr_db for record in quantized if record.sqnr_db is not None)
    rows = [
        ["artifact", made.name],
        ["method", made.method],
        ["format", made.format],
        ["size", megabytes(sum(record.bytes for record in made.files))],
        ["bits per weight", f"{_bits(made.bits_per_weight)} quantized linears, {_bits(made.bits_per_weight_all)} all"],
        ["linears", f"{len(quantized)} quantized, {len(made.tensors) - len(quantized)} left as they are"],
    ]
    if noise:
        rows.append(["SQNR", f"median {noise[len(noise) // 2]:.1f} dB, lowest {noise[0]:.1f} dB"])
    rows.append(["time", f"{made.quantize_s:.1f} s"])
    before = [f"source: {note}" for note in made.source.get("notes", [])]
    return "\n".join([columns(rows), *before, *_first(made.fallbacks(), "note: ")])


def exported(made: Manifest) -> str:
    """What export made, and how far it is from the artifact that it was made from."""
    assert made.export is not None
    weights, logits = made.export["weights"], made.export["logits"]
    said = f"{weights['equal']} of {weights['tensors']} tensors decode to the same numbers"
    if weights["lowest_sqnr_db"] is not None:
        said += f", the others with an SQNR of {weights['lowest_sqnr_db']:.1f} dB or more"
    rows = [["weights", said]]
    for key, label in (("decoded", "logits, decoded"), ("llama_cpp", "logits, llama.cpp")):
        rows.append([label, _logits(logits[key])])
    return "\n".join([manifest(made), columns(rows)])


def _logits(found: dict[str, Any]) -> str:
    if "missing" in found:
        return f"not measured: {found['missing']}"
    largest = found["largest_difference"]
    return f"KL {found['kl_nats']:.2g} nats, same likeliest token {found['top1']:.1%}, largest difference {largest:.2g}"


def inspection(facts: dict[str, Any]) -> str:
    """An artifact at a glance: tensors of one role and shape share a line."""
    bits, bits_all = _bits(facts["bits_per_weight"]), _bits(facts["bits_per_weight_all"])
    rows = [
        ["artifact", facts["artifact"]],
        ["format", facts["format"]],
        ["method", facts["method"] or "not recorded in the file"],
        ["parameters", f"{facts['parameters'] / 1e6:.1f} million"],
        ["weights", megabytes(facts["weight_bytes"])],
        ["bits per weight", f"{bits} quantized linears, {bits_all} all"],
    ]
    lineage = facts["lineage"]
    if lineage is None:
        rows.append(["lineage", "none: no quantkit.json beside it"])
    else:
        source, calibration = lineage["source"], lineage["calibration"]
        rows.append(["source", " ".join(str(source[key]) for key in ("id", "revision", "kind") if source.get(key))])
        if lineage.get("export"):
            rows.append(
                ["exported from", f"{lineage['export']['artifact']['id']}, {lineage['export']['artifact']['format']}"]
            )
        if lineage["recipe_sha256"]:
            rows.append(["recipe", f"sha256 {lineage['recipe_sha256']}"])
        if calibration:
            said = f"{calibration.get('set')}, {calibration.get('sequences')} x {calibration.get('length')}"
            rows.append(["calibration", f"{said}, ids {str(calibration.get('fingerprint'))[:16]}"])
        rows.append(["made", f"{lineage['created']} by quantkit {lineage['quantkit_version']}"])
    reasons = [f"{tensor['name']}: {tensor['reason']}" for tensor in facts["tensors"] if tensor.get("reason")]
    return "\n".join([columns(rows), "", _tensor_table(facts["tensors"]), *_first(reasons, "note: ")])


def doctor(facts: dict[str, Any]) -> str:
    """The state of the machine, engines last: what they run, or what to install."""
    cpu, memory = facts["cpu"], facts["memory"]
    gpus = [f"{gpu['name']}, {megabytes(gpu['memory_bytes'])}" for gpu in facts["gpus"]]
    free = f"{megabytes(memory['available_bytes'])} free of {megabytes(memory['total_bytes'])}"
    rows = [
        ["quantkit", f"{facts['quantkit']}, Python {facts['python']}, {facts['platform']}"],
        ["processor", f"{cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads"],
        ["GPU", "; ".join(gpus) or "none that this torch sees"],
        ["memory", free],
        ["disk", f"{megabytes(facts['disk']['free_bytes'])} free here"],
    ]
    packages = [[name, version or "not installed"] for name, version in facts["packages"].items()]
    engines = [
        [engine["name"], ", ".join(engine["formats"]) or "-", "ready" if engine["available"] else engine["reason"]]
        for engine in facts["engines"]
    ]
    return "\n\n".join([columns(rows), columns(packages), columns([["engine", "runs", "state"], *engines])])


def recipes(shipped: Sequence[Shipped]) -> str:
    """Name, kind and the first sentence of what each is for."""
    return columns([[recipe.name, recipe.kind, first_sentence(recipe.description)] for recipe in shipped])


def calibration_sets(sets: Sequence[tuple[str, str]]) -> str:
    """Name and the first sentence of each set's description."""
    return columns([[name, first_sentence(description)] for name, description in sets])


def first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence, without it."""
    return text.split(". ")[0].rstrip(".")


def _tensor_table(tensors: Sequence[dict[str, Any]]) -> str:
    counted = Counter(
        (
            ".".join("*" if part.isdecimal() else part for part in tensor["name"].split(".")),
            " x ".join(map(str, tensor["shape"])),
            _bits(tensor["bits_per_weight"]),
            tensor.get("applied") or "",
        )
        for tensor in tensors
    )
    rows = [[str(count), *key] for key, count in counted.items()]
    return columns([["count", "tensor", "shape", "bits", "applied"], *rows], right=(0, 3))


def _bits(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _first(lines: Sequence[str], prefix: str) -> list[str]:
    shown = [prefix + line for line in lines[:FALLBACKS_SHOWN]]
    more = len(lines) - len(shown)
    return shown + ([f"{prefix}and {more} more, see --json"] if more > 0 else [])
