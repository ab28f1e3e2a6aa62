"""The only loop over blocks: read a block, look at its inputs, quantize it with every recipe, write, drop.

Several recipes with one model and one calibration set go through the model together: each block is read once, and
recipes that calibrate on the unquantized model share its statistics. Peak memory is a block, its statistics and the
hidden states.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from quantkit import __version__
from quantkit.device import Arithmetic, arithmetic
from quantkit.environment import environment, peak_rss_bytes
from quantkit.formats.base import LinearPlan, Writer
from quantkit.manifest import Manifest, TensorRecord, file_record, write_manifest
from quantkit.maths.gram import Importance, InputStatistics
from quantkit.maths.measure import energies, sqnr_db
from quantkit.memory import NO_LIMIT, MemoryLimit, return_freed_memory
from quantkit.methods.base import BlockResult, BlockWeights, Method, merge
from quantkit.model.blocks import Block, LinearGroup, architecture_of, blocks_of, head_dim
from quantkit.model.calibration import CalibrationSet
from quantkit.model.forward import BlockRunner
from quantkit.model.hidden import HiddenStates
from quantkit.model.source import Source
from quantkit.output import no_space_explained, published
from quantkit.progress import Progress
from quantkit.recipe import Recipe, recipe_sha256
from quantkit.streaming import Measuring, skipped, store, stream
from quantkit.tensors import on_cpu


@dataclass(frozen=True)
class Job:
    """One artifact to make: a recipe, its plan for this model and the folder it goes to.

    importance: {linear module name: importance of its columns}, where the recipe names a file of it.
    """

    label: str
    recipe: Recipe
    plans: list[LinearPlan]
    out: Path
    importance: Mapping[str, Importance] = field(default_factory=dict)


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
    hidden: HiddenStates | None = None  # its own hidden states, when quantized outputs are propagated
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
    memory: MemoryLimit = NO_LIMIT,
) -> list[Manifest]:
    """Make every job's artifact in one pass over the model; each appears complete or not at all.

    calibration: the token ids that calibrated methods need; None when no job has one. memory: how much may be held at
    once; the artifact is the same whatever it says. Raises ModelError for a damaged or non-finite model, DataError for
    a full disk; nothing is left behind then.
    """
    if memory.limit_bytes is not None:
        return_freed_memory()
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
        how = _arithmetic(states, source, device)
        shared_s = _run(states, source, calibration, device, how, memory, progress)
        manifests = []
        for state in states:
            started = time.perf_counter()
            paths = state.writer.finish()
            state.own_s += time.perf_counter() - started
            manifest = _manifest(state, paths, source, calibration, device, how, state.own_s + shared_s)
            write_manifest(manifest, state.folder)
            manifests.append(manifest)
    return manifests


def _arithmetic(states: list[_State], source: Source, device: torch.device) -> Arithmetic:
    """What the calibration of a pass is computed in; its jobs share their calibration section."""
    exact = any(state.calibrated and state.job.recipe.calibration.precision == "float32" for state in states)
    return arithmetic(device, source.dtype(f"{blocks_of(source)[0].linears[0]}.weight"), exact=exact)


def _run(
    states: list[_State],
    source: Source,
    calibration: CalibrationSet | None,
    device: torch.device,
    how: Arithmetic,
    memory: MemoryLimit,
    progress: Progress,
) -> float:
    """The loop. Returns the seconds spent for all jobs together: reading, and running the unquantized model."""
    started = time.perf_counter()
    blocks = blocks_of(source)
    in_blocks = {name for block in blocks for name in block.tensors}
    outside = [name for name in source.names() if name not in in_blocks]
    head = architecture_of(source.config).head
    calibrated = [state for state in states if state.calibrated]
    run = None
    if calibrated:
        assert calibration is not None, "the caller builds the calibration set that its recipes ask for"
        run = _start(source, calibration, device, how, memory, states[0].folder)
    title = "quantizing " + ", ".join(state.job.label for state in states)
    with progress.task(title, len(blocks) + 1) as tracker, Measuring() as measuring:
        stream(states, source, [name for name in outside if name != f"{head}.weight"], None, device, measuring)
        if run is None:
            for block in blocks:
                stream(states, source, block.tensors, block, torch.device("cpu"), measuring)
                tracker.advance(note=block.prefix.rstrip("."))
        else:
            for block, tensors in _read(source, blocks, ahead=device.type == "cuda"):
                _run_block(states, run, block, tensors, last=block is blocks[-1])
                del tensors
                tracker.advance(note=block.prefix.rstrip("."))
        if not source.tied_head:
            alone = Block(-1, "", (head,), (LinearGroup((head,)),), (f"{head}.weight",))
            stream(states, source, alone.tensors, alone, device, measuring)
        tracker.advance(note=head)
    return time.perf_counter() - started - sum(state.own_s for state in states)


@dataclass
class _Run:
    """The model on its way through its blocks. hidden: of the unquantized model, None once no job needs them."""

    runner: BlockRunner
    memory: MemoryLimit
    hidden: HiddenStates | None


def _start(
    source: Source,
    calibration: CalibrationSet,
    device: torch.device,
    how: Arithmetic,
    memory: MemoryLimit,
    scratch: Path,
) -> _Run:
    """Embed the calibration set; hidden states that would take over a quarter of the room go to a scratch file."""
    runner = BlockRunner(source, device, how)
    width = source.shape(f"{architecture_of(source.config).embedding}.weight")[1]
    size = calibration.ids.numel() * width * runner.dtype.itemsize
    spill = scratch if size > memory.room_bytes(torch.device("cpu")) // 4 else None
    return _Run(runner, memory, runner.embed(calibration.ids, spill))


def _read(source: Source, blocks: Sequence[Block], *, ahead: bool) -> Iterator[tuple[Block, dict[str, Tensor]]]:
    """Each block and its tensors. ahead: read the next one while this one is worked on, which pays where the work is
    done by another device than the reading; it takes the memory of one more block."""

    def tensors(block: Block) -> dict[str, Tensor]:
        return {name: source.read(name) for name in block.tensors}

    if not ahead:
        for block in blocks:
            yield block, tensors(block)
        return
    with ThreadPoolExecutor(max_workers=1) as pool:
        coming = pool.submit(tensors, blocks[0])
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            found = coming.result()
            if following is not None:
                coming = pool.submit(tensors, following)
            yield block, found


def _run_block(states: list[_State], run: _Run, block: Block, tensors: Mapping[str, Tensor], *, last: bool) -> None:
    """One block for every job. Jobs that look at the unquantized model's inputs share them; others have their own."""
    runner = run.runner
    on_device = {name: tensor.to(runner.device) for name, tensor in tensors.items()}
    followers = [state for state in states if state.calibrated and not state.propagates]
    leaders = [state for state in states if state.calibrated and state.propagates]
    if run.hidden is not None:
        for position, state in enumerate(leaders, 1):
            # the first block's inputs are those of the unquantized model for everyone
            if state.hidden is None:
                state.hidden = run.hidden.copy() if followers or position < len(leaders) else run.hidden
    statistics: dict[str, InputStatistics] = {}
    with runner.loaded(block, on_device) as module:
        if followers:
            assert run.hidden is not None
            statistics = runner.statistics(module, block, run.hidden, advance=not last)
        else:
            run.hidden = None
        for state in states:
            if state in leaders:
                _quantize_staged(state, run, module, block, on_device, last=last)
            else:
                _quantize_block(state, block, on_device, statistics)


def _quantize_staged(
    state: _State, run: _Run, module: nn.Module, block: Block, tensors: Mapping[str, Tensor], *, last: bool
) -> None:
    """Quantize one block for a job whose linears see inputs that passed everything rounded before them."""
    started = time.perf_counter()
    runner, hidden = run.runner, state.hidden
    assert hidden is not None
    now = dict(tensors)
    results, works = [], []
    for method, given in _shares(state, block, tensors):
        work = method.begin(given)
        if work is not None:
            works.append(work)
        else:
            results.append(method.quantize_block(given, {}))
            made = results[-1].quantized
            now |= {f"{name}.weight": block.oriented(tensor.dequantize()) for name, tensor in made.items()}
    if any(work.steps.exponents for work in works):
        runner.assign(module, block, now)
        seen = runner.statistics(module, block, hidden.copy(every=_every(hidden)), advance=False)
        for work in works:
            work.fold(seen)
            now |= {f"{name}.weight": block.oriented(weight) for name, weight in work.weights.items()} | work.replaced

    def rounder(group: LinearGroup, seen: InputStatistics) -> dict[str, Tensor]:
        done: dict[str, Tensor] = {}
        for work in works:
            if work.ours(group):
                done |= work.round(group, seen.gram)
        return {f"{name}.weight": block.oriented(weight) for name, weight in done.items()}

    runner.assign(module, block, now)
    keep = runner.kept_bytes(block, hidden) < run.memory.room_bytes(runner.device)
    runner.staged(module, block, hidden, rounder, keep=keep, advance=not last)
    results += [work.result() for work in works]
    _finish_block(state, block, tensors, merge(results))
    state.own_s += time.perf_counter() - started


def _every(hidden: HiddenStates) -> int:
    """Of how many sequences one is looked at for the scales: an eighth, but 2048 tokens where there are as many."""
    return max(1, min(8, hidden.shape[0] * hidden.shape[1] // 2048))


def _shares(state: _State, block: Block, tensors: Mapping[str, Tensor]) -> Iterator[tuple[Method, BlockWeights]]:
    """Each method of a job with the linears of the block that are its own."""
    by_method: dict[Method, list[str]] = {}
    for linear in block.linears:
        if linear in state.methods:
            by_method.setdefault(state.methods[linear].of_block(), []).append(linear)
    others = {name: tensor for name, tensor in tensors.items() if name.removesuffix(".weight") not in state.methods}
    for method, linears in by_method.items():
        weights = {linear: block.oriented(tensors[f"{linear}.weight"]) for linear in linears}
        layout, own = state.layout, {linear: state.methods[linear] for linear in linears}
        yield (
            method,
            BlockWeights(block, weights, others, layout.norm_offset, layout.head_dim, state.job.importance, own),
        )


def _quantize_block(
    state: _State, block: Block, tensors: Mapping[str, Tensor], statistics: Mapping[str, InputStatistics]
) -> None:
    """Quantize one block for one job by statistics that are there already."""
    started = time.perf_counter()
    results = [
        method.quantize_block(given, statistics if method.calibrated else {})
        for method, given in _shares(state, block, tensors)
    ]
    _finish_block(state, block, tensors, merge(results))
    state.own_s += time.perf_counter() - started


def _finish_block(state: _State, block: Block, tensors: Mapping[str, Tensor], merged: BlockResult) -> None:
    """Write one block of one job, and record what was done to each linear."""
    for name, tensor in tensors.items():
        linear = name.removesuffix(".weight")
        if name.endswith(".weight") and linear in merged.quantized:
            _write_quantized(state, linear, block.oriented(tensor), merged)
        else:
            stored = store(state, name, merged.replaced.get(name, tensor))
            if name.endswith(".weight") and linear in block.linears:
                state.records.append(skipped(linear, stored, tensor.numel()))


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
            sqnr_db=sqnr_db(*energies(reference, tensor.pieces())),
            reason=result.notes.get(linear),
        )
    )


def _manifest(
    state: _State,
    paths: Sequence[Path],
    source: Source,
    calibration: CalibrationSet | None,
    device: torch.device,
    how: Arithmetic,
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
        calibration={
            **section.model_dump(mode="json"),
            "fingerprint": calibration.fingerprint,
            "arithmetic": how.label(),
        }
        if state.calibrated and calibration is not None
        else None,
        quantize_s=round(seconds, 3),
        peak_rss_bytes=peak_rss_bytes(),
        tensors=[*state.records, *state.writer.substitutes],
        bits_per_weight=bits / sum(counts[record.name] for record in quantized) if quantized else None,
        bits_per_weight_all=weight_bytes * 8 / source.parameter_count(),
        files=files,
        environment=environment(device.type),
    )
