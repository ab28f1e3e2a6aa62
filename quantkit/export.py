"""What the verb `export` does: a finished artifact becomes a GGUF file of the same codes, without rounding again."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from quantkit import __version__
from quantkit.environment import environment, peak_rss_bytes
from quantkit.errors import ModelError, UsageError, VerificationError
from quantkit.export_check import Difference, compare_logits, compare_weights
from quantkit.formats import open_artifact
from quantkit.formats.base import ArtifactSource
from quantkit.formats.gguf import GGUFArtifact, GGUFWriter, tensor_table, unwritable
from quantkit.formats.gguf_types import DTYPE_TYPES, is_added, written_names
from quantkit.inspection import method_label
from quantkit.manifest import (
    MANIFEST_NAME,
    Manifest,
    TensorRecord,
    file_record,
    partial_path,
    read_manifest,
    write_manifest,
)
from quantkit.maths.ggml_export import BLOCK, HOLDERS, holding_type, to_blocks
from quantkit.model.blocks import architecture_of
from quantkit.output import check_file, check_space, no_space_explained
from quantkit.progress import Progress
from quantkit.tensors import CodebookBlocks, Grid, GroupTensor, Int8Rows, QuantizedTensor

SHOWN = 4
"""Problems that a message shows in full."""


@dataclass(frozen=True)
class _Plan:
    """types: ggml's type of every tensor that is written. grids: {weight name: what it is quantized to now}."""

    types: Mapping[str, str]
    grids: Mapping[str, str]

    @property
    def file_type(self) -> str:
        """The type of most quantized tensors."""
        return Counter(self.types[name] for name in self.grids).most_common(1)[0][0]


def export(artifact: Path, out: Path, *, exact: bool, force: bool, progress: Progress) -> Manifest:
    """Write an artifact of any other format as OUT.gguf, with its manifest beside it, and measure the difference.

    exact: refuse what no type holds exactly; else scales and minima may be rounded to float16, never the codes.
    Raises UsageError for an output that may not be written, ModelError for an artifact that GGUF cannot hold,
    VerificationError when the file read back does not decode to the artifact's weights; nothing is left behind then.
    """
    started = time.perf_counter()
    _check_out(out, force=force)
    source = open_artifact(artifact)
    if source.format_name == "gguf":
        raise ModelError(f"{artifact}: is a GGUF file already", hint="expected a folder with quantized weights")
    plan = _plan(source, exact, progress)
    check_space(out, sum(info.size for info in tensor_table(source, plan.types).values()))
    with no_space_explained(out.parent), _beside(out) as folder:
        path, stored = _write(source, plan, folder, out.name, progress)
        difference = compare_weights(source, GGUFArtifact(path), progress)
        if exact and difference.wrong:
            raise VerificationError(
                f"{out}: {len(difference.wrong)} tensors decode to other weights than {artifact} has, the first "
                f"{difference.wrong[0]}; nothing was written",
                hint="this is a bug in quantkit; please report it",
            )
        progress.say("comparing logits")
        logits = compare_logits(artifact, path, difference)
        manifest = _manifest(artifact, source, plan, path, stored, difference, logits, exact, started)
        return _publish(path, manifest, out)


def _check_out(out: Path, *, force: bool) -> None:
    """Refuse an output that is no GGUF file's name, that exists or cannot be made, or whose folder has the manifest of
    something else. Raises UsageError, ModelError for a manifest that is none."""
    if out.suffix != ".gguf":
        raise UsageError(f"{out}: expected the name of a file that ends in .gguf")
    check_file(out, force=force)
    known = read_manifest(out.parent) if out.parent.is_dir() else None
    files = {record.name for record in known.files} if known else set()
    if known is not None and files != {out.name}:
        raise UsageError(
            f"{out.parent / MANIFEST_NAME}: belongs to another artifact, {known.name}",
            hint=f"a folder holds one artifact: {out.parent / out.stem / out.name} would do",
        )
    if out.exists() and not files:
        raise UsageError(f"{out}: was not made by quantkit, so it is not replaced", hint="move it away")


def _plan(source: ArtifactSource, exact: bool, progress: Progress) -> _Plan:
    """The type of every tensor. Raises ModelError with all that GGUF cannot hold."""
    problems = unwritable(source)
    names = [] if problems else written_names(source)
    if architecture_of(source.config).transposed:
        problems.append(f"{source.config['architectures'][0]}: keeps its linears as Conv1D; export does not read those")
        names = []
    types, grids, hints = {}, {}, []
    with progress.task("looking at codes", len(names)) as tracker:
        for name in names:
            quantized = source.quantized(name)
            try:
                if quantized is not None:
                    tensor = _grouped(quantized)
                    types[name], grids[name] = holding_type(tensor, exact=exact), tensor.grid.label()
                else:
                    types[name] = "F32" if is_added(source, name) else _float_type(source.dtype(name))
            except ModelError as error:
                label = f" ({quantized.grid.label()})" if isinstance(quantized, GroupTensor) else ""
                problems.append(f"{name}{label}: {error.message}")
                hints.append(error.hint)
            tracker.advance(note=name)
    if problems:
        more = [f"... and {len(problems) - SHOWN} more tensors"] if len(problems) > SHOWN else []
        lines = [f"{source.path}: GGUF cannot hold it: {problems[0]}", *problems[1:SHOWN], *more]
        held = f"{', '.join(HOLDERS[:-1])} and {HOLDERS[-1]} hold integers of up to 8 bits around a zero, with one "
        lines += [f"{held}float16 scale for each {BLOCK} columns or more"] if hints else []
        hint = next((hint for hint in hints if hint), "quantize the model itself with method ggml")
        raise ModelError("\n".join(lines), hint=hint)
    if not grids:
        raise ModelError(f"{source.path}: has no quantized weights", hint="quantkit quantize takes unquantized models")
    return _Plan(types, grids)


def _grouped(quantized: QuantizedTensor) -> GroupTensor:
    """A quantized weight as groups of affine codes. Raises ModelError when it is something else."""
    if isinstance(quantized, Int8Rows):
        codes = (quantized.codes.to(torch.int16) + 128).to(torch.uint8)
        return GroupTensor(codes, (quantized.absmax.float() / 127.0).unsqueeze(1), None, Grid(8, None, True))
    if isinstance(quantized, CodebookBlocks):
        raise ModelError("its codes stand for the values of a codebook, NF4's or FP4's, which no GGUF type has")
    assert isinstance(quantized, GroupTensor), "GGUF files are refused before"
    return quantized


def _float_type(dtype: torch.dtype) -> str:
    if dtype not in DTYPE_TYPES:
        known = ", ".join(str(known).removeprefix("torch.") for known in DTYPE_TYPES)
        raise ModelError(f"stored in {str(dtype).removeprefix('torch.')}, expected {known}")
    return DTYPE_TYPES[dtype]


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A folder beside an output, on the same disk, that vanishes at the end."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(out)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(
    source: ArtifactSource, plan: _Plan, folder: Path, file_name: str, progress: Progress
) -> tuple[Path, dict[str, int]]:
    """The file, and the bytes that each tensor takes in it."""
    writer = GGUFWriter(folder, source, plan.types, plan.file_type, [], file_name)
    stored = {}
    with progress.task(f"writing {file_name}", len(plan.types)) as tracker:
        for name, type_name in plan.types.items():
            quantized = source.quantized(name)
            value = source.read(name) if quantized is None else to_blocks(_grouped(quantized), type_name)
            stored[name] = writer.add(name, value)
            tracker.advance(note=name)
    (path,) = writer.finish()
    return path, stored


def _publish(path: Path, manifest: Manifest, out: Path) -> Manifest:
    """Put a whole file in its place, then its manifest: at no time does one stand beside a file that it is not of."""
    (out.parent / MANIFEST_NAME).unlink(missing_ok=True)
    path.replace(out)
    return write_manifest(manifest, out.parent)


def _manifest(
    artifact: Path,
    source: ArtifactSource,
    plan: _Plan,
    path: Path,
    stored: Mapping[str, int],
    difference: Difference,
    logits: dict[str, Any],
    exact: bool,
    started: float,
) -> Manifest:
    """What the artifact's own manifest says of recipe, calibration and linears goes on; bytes are those of the file."""
    made = read_manifest(artifact)
    method = made.method if made else method_label(source.quantization) or source.format_name
    known = {record.name: record for record in made.tensors} if made else {}
    records, sizes = [], {}
    for name, grid in plan.grids.items():
        linear, (rows, columns) = name.removesuffix(".weight"), source.shape(name)
        before = known.get(linear)
        sizes[linear] = rows * columns
        records.append(
            TensorRecord(
                name=linear,
                requested=before.applied if before else grid,
                applied=f"gguf {plan.types[name]}",
                bits_per_weight=stored[name] * 8 / sizes[linear],
                # that of the artifact against the unquantized weight, which is not here
                sqnr_db=before.sqnr_db if before and name not in difference.unequal else None,
                reason=before.reason if before else None,
            )
        )
    file = file_record(path, path.parent)
    quantized_bits = sum(stored[name] * 8 for name in plan.grids)
    seconds = time.perf_counter() - started
    return Manifest(
        name=path.stem,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        quantkit_version=__version__,
        recipe=made.recipe if made else {},
        recipe_sha256=made.recipe_sha256 if made else "",
        method=f"{method}, as gguf {plan.file_type}",
        method_name=made.method_name if made else str(source.quantization.get("quant_method", source.format_name)),
        format="gguf",
        source=made.source if made else {**source.lineage(), "notes": list(source.notes)},
        calibration=made.calibration if made else None,
        quantize_s=round(seconds + (made.quantize_s if made else 0.0), 3),
        peak_rss_bytes=peak_rss_bytes(),
        tensors=[*records, *(record for record in known.values() if record.requested == "skip")],
        bits_per_weight=quantized_bits / sum(sizes.values()),
        bits_per_weight_all=file.bytes * 8 / source.parameter_count(),
        files=[file],
        environment=environment("cpu"),
        inputs=made.inputs if made else [],
        export={
            "artifact": {**source.lineage(), "format": source.format_name, "method": method},
            "exact": exact,
            "types": dict(Counter(plan.types.values()).most_common()),
            "weights": difference.as_dict(),
            "logits": logits,
            "export_s": round(seconds, 3),
        },
    )
