"""The only loop over blocks: read a block, look at its inputs, quantize it with every recipe, write, drop.

Several recipes with one model and one calibration set go through the model together: each block is read once, and
recipes that calibrate on the unquantized model share its statistics. Peak memory is a block, its statistics and the
hidden states.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from quantkit import __version__
from quantkit.device import compute_dtype
from quantkit.environment import environment, peak_rss_bytes
from quantkit.errors import ModelError
from quantkit.formats.base import LinearPlan, Writer
from quantkit.manifest import Manifest, TensorRecord, file_record, write_manifest
from quantkit.maths.gram import InputStatistics
from quantkit.maths.measure import sqnr_db
from quantkit.methods.base import BlockResult, BlockWeights, Method, merge
from quantkit.model.blocks import Block, LinearGroup, architecture_of, blocks_of, head_dim
from quantkit.model.calibration import CalibrationSet
from quantkit.model.forward import BlockRunner
from quantkit.model.source import Source
from quantkit.output import no_space_explained, published
from quantkit.progress import Progress
from quantkit.recipe import Recipe, recipe_sha256
from quantkit.tensors import on_cpu


@dataclass(frozen=True)
class Job:
    """One artifact to make: a recipe, its plan for this model and the folder it goes to."""

    label: str
    recipe: Recipe
    plans: list[LinearPlan]
    out: Path


@dataclass(frozen=True)
class _Layout:
    """What folding scales needs to know of a model."""

    norm_offset: float
    head_dim: int | None


@dataclass
class _State:
    """A job on its way through the model."""

    job: Job
    writer: Writer
    folder: Path
    dtype: torch.dtype
    methods: dict[str, Method]
    layout: _Layout
    records: list[TensorRecord] = field(default_factory=list)
    hidden: Tensor | None = None  # its own hidden states, when quantized outputs are propagated
    own_s: float = 0.0

    @property
    def calibrated(self) -> bool:
        return any(method.calibrated for method in self.methods.values())

    @property
    def propagates(self) -> bool:
        return any(getattr(method, "propagate", None) == "quantized" for method in self.methods.values())


def quantize(
    jobs: Sequence[Job],
    source: Source,
    calibration: CalibrationSet | None,
    device: torch.device,
    progress: Progress,
) -> list[Manifest]:
    """Make every job's artifact in one pass over the model; each appears complete or not at all.

    calibration: the token ids that calibrated methods need; None when no job has one. Raises ModelError for a damaged
    or non-finite model, DataError for a full disk; nothing is left behind then.
    """
    layout = _Layout(architecture_of(source.config).norm_offset, head_dim(source.config))
    with ExitStack() as stack:
        states = []
        for job in jobs:
            stack.enter_context(no_space_explained(job.out))
            folder = stack.enter_context(published(job.out))
            dtype = getattr(torch, job.recipe.model.dtype)
            writer = job.recipe.resolved_format.writer(folder, source, job.plans, dtype)
            methods = {plan.name: plan.method for plan in job.plans if plan.method is not None}
            states.append(_State(job, writer, folder, dtype, methods, layout))
        shared_s = _run(states, source, calibration, device, progress)
        manifests = []
        for state in states:
            started = time.perf_counter()
            paths = state.writer.finish()
            state.own_s += time.perf_counter() - started
            manifest = _manifest(state, paths, source, calibration, device, state.own_s + shared_s)
            write_manifest(manifest, state.folder)
            manifests.append(manifest)
    return manifests


def _run(
    states: list[_State],
    source: Source,
    calibration: CalibrationSet | None,
    device: torch.device,
    progress: Progress,
) -> float:
    """The loop. Returns the seconds spent for all jobs together: reading, and running the unquantized model."""
    started = time.perf_counter()
    blocks = blocks_of(source)
    in_blocks = {name for block in blocks for name in block.tensors}
    outside = [name for name in source.names() if name not in in_blocks]
    head = architecture_of(source.config).head
    calibrated = [state for state in states if state.calibrated]
    runner, hidden = None, None
    if calibrated:
        assert calibration is not None, "the caller builds the calibration set that its recipes ask for"
        runner = BlockRunner(source, device, compute_dtype(device, source.dtype(blocks[0].linears[0] + ".weight")))
        hidden = runner.embed(calibration.ids)
    title = "quantizing " + ", ".join(state.job.label for state in states)
    with progress.task(title, len(blocks) + 1) as tracker:
        for name in outside:
            if name != f"{head}.weight":
                tensor = source.read(name)
                for state in states:
                    _store(state, name, tensor)
        for block in blocks:
            tensors = {name: source.read(name) for name in block.tensors}
            hidden = _run_block(states, runner, block, tensors, hidden, last=block is blocks[-1])
            tracker.advance(note=block.prefix.rstrip("."))
        if not source.tied_head:
            _run_head(states, head, source.read(f"{head}.weight"), device)
        tracker.advance(note=head)
    return time.perf_counter() - started - sum(state.own_s for state in states)


def _run_block(
    states: list[_State],
    runner: BlockRunner | None,
    block: Block,
    tensors: dict[str, Tensor],
    hidden: Tensor | None,
    *,
    last: bool,
) -> Tensor | None:
    """One block for every job. Returns the unquantized model's hidden states behind it, None when no job needs them."""
    on_device = tensors if runner is None else {name: tensor.to(runner.device) for name, tensor in tensors.items()}
    if runner is None:
        for state in states:
            _quantize_block(state, block, on_device, {})
        return None
    followers = [state for state in states if state.calibrated and not state.propagates]
    leaders = [state for state in states if state.calibrated and state.propagates]
    statistics: dict[str, InputStatistics] = {}
    with runner.loaded(block, on_device) as module:
        if hidden is not None:
            # the first block's inputs are those of the unquantized model for everyone
            for state in leaders:
                if state.hidden is None:
                    state.hidden = hidden.clone() if followers or len(leaders) > 1 else hidden
            first = block.index == 0
            if followers or first:
                statistics = runner.statistics(module, block, hidden, advance=bool(followers) and not last)
        for state in states:
            seen = statistics
            if state in leaders and block.index > 0:
                started = time.perf_counter()
                assert state.hidden is not None
                runner.assign(module, block, on_device)
                seen = runner.statistics(module, block, state.hidden, advance=False)
                state.own_s += time.perf_counter() - started
            result = _quantize_block(state, block, on_device, seen)
            if state in leaders and not last:
                _propagate(state, runner, module, block, on_device, result)
    return hidden if followers else None


def _propagate(
    state: _State,
    runner: BlockRunner,
    module: nn.Module,
    block: Block,
    tensors: dict[str, Tensor],
    result: BlockResult,
) -> None:
    """Send a job's own hidden states through its quantized block."""
    started = time.perf_counter()
    assert state.hidden is not None
    quantized = {f"{name}.weight": tensor.dequantize() for name, tensor in result.quantized.items()}
    runner.assign(module, block, {**tensors, **result.replaced, **quantized})
    runner.forward(module, block, state.hidden)
    state.own_s += time.perf_counter() - started


def _quantize_block(
    state: _State, block: Block, tensors: Mapping[str, Tensor], statistics: Mapping[str, InputStatistics]
) -> BlockResult:
    """Quantize one block for one job, write it, and record what was done to each linear."""
    started = time.perf_counter()
    by_method: dict[Method, list[str]] = {}
    for linear in block.linears:
        if linear in state.methods:
            by_method.setdefault(state.methods[linear], []).append(linear)
    others = {name: tensor for name, tensor in tensors.items() if name.removesuffix(".weight") not in state.methods}
    results = []
    for method, linears in by_method.items():
        weights = {linear: tensors[f"{linear}.weight"] for linear in linears}
        given = BlockWeights(block, weights, others, state.layout.norm_offset, state.layout.head_dim)
        result = method.quantize_block(given, statistics if method.calibrated else {})
        results.append(result)
        others = {**others, **result.replaced}
    merged = merge(results)
    for name, tensor in tensors.items():
        linear = name.removesuffix(".weight")
        if name.endswith(".weight") and linear in merged.quantized:
            _write_quantized(state, linear, tensor, merged)
        else:
            stored = _store(state, name, merged.replaced.get(name, tensor))
            if name.endswith(".weight") and linear in block.linears:
                _record_skipped(state, linear, stored, tensor.numel())
    state.own_s += time.perf_counter() - started
    return merged


def _run_head(states: Sequence[_State], head: str, weight: Tensor, device: torch.device) -> None:
    """The output projection of a model that does not tie it to the embedding."""
    name = f"{head}.weight"
    block = Block(-1, "", (head,), (LinearGroup((head,)),), (name,))
    for state in states:
        _quantize_block(state, block, {name: weight.to(device) if head in state.methods else weight}, {})


def _write_quantized(state: _State, linear: str, weight: Tensor, result: BlockResult) -> None:
    tensor = result.quantized[linear]
    stored = state.writer.add(f"{linear}.weight", on_cpu(tensor))
    reference = result.reference.get(linear, weight)
    state.records.append(
        TensorRecord(
            name=linear,
            requested=state.methods[linear].label(),
            applied=result.applied[linear],
            bits_per_weight=stored * 8 / weight.numel(),
            sqnr_db=sqnr_db(reference, tensor.dequantize()),
            reason=result.notes.get(linear),
        )
    )


def _record_skipped(state: _State, linear: str, stored: int, count: int) -> None:
    state.records.append(
        TensorRecord(name=linear, requested="skip", applied="unquantized", bits_per_weight=stored * 8 / count)
    )


def _store(state: _State, name: str, tensor: Tensor) -> int:
    """Write a tensor that stays unquantized; the writer converts it. Raises ModelError when its dtype is too narrow."""
    largest = torch.finfo(state.dtype).max
    if tensor.is_floating_point() and tensor.numel() and float(tensor.abs().max()) > largest:
        raise ModelError(
            f"{name}: values up to {float(tensor.abs().max()):.3g} do not fit {state.job.recipe.model.dtype}, "
            f"whose largest is {largest:.6g}",
            hint="--set model.dtype=bfloat16",
        )
    return state.writer.add(name, tensor.cpu())


def _manifest(
    state: _State,
    paths: Sequence[Path],
    source: Source,
    calibration: CalibrationSet | None,
    device: torch.device,
    seconds: float,
) -> Manifest:
    recipe = state.job.recipe
    files = [file_record(path, state.folder) for path in sorted(paths)]
    weight_bytes = sum(record.bytes for record in files if record.name.endswith((".safetensors", ".gguf")))
    counts = {plan.name: plan.out_features * plan.in_features for plan in state.job.plans}
    quantized = [record for record in state.records if record.requested != "skip"]
    bits = sum(record.bits_per_weight * counts[record.name] for record in quantized)
    section = recipe.calibration
    return Manifest(
        name=state.job.label,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        quantkit_version=__version__,
        recipe=recipe.model_dump(mode="json"),
        recipe_sha256=recipe_sha256(recipe),
        method=recipe.method.label(),
        method_name=recipe.method.name,
        format=recipe.resolved_format.name,
        source={**source.lineage(), "notes": list(source.notes)},
        calibration={**section.model_dump(mode="json"), "fingerprint": calibration.fingerprint}
        if state.calibrated and calibration is not None
        else None,
        quantize_s=round(seconds, 3),
        peak_rss_bytes=peak_rss_bytes(),
        tensors=state.records,
        bits_per_weight=bits / sum(counts[record.name] for record in quantized) if quantized else None,
        bits_per_weight_all=weight_bytes * 8 / source.parameter_count(),
        files=files,
        environment=environment(device.type),
    )
