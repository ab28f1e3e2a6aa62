"""The only loop over blocks: read a block, look at its inputs, quantize it with every recipe, write, drop.

Several recipes with one model and one calibration set go through the model together: each block is read once, and
recipes that calibrate on the unquantized model share its statistics. Peak memory is a block, its statistics and the
hidden states.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from quantkit import __version__, arena
from quantkit.card import with_card
from quantkit.checkpoint import Checkpoints
from quantkit.compiling import compiling_told
from quantkit.device import Arithmetic, arithmetic
from quantkit.environment import environment, peak_rss_bytes
from quantkit.manifest import Manifest, file_record, weight_bytes, write_manifest
from quantkit.maths.gram import InputStatistics, Look
from quantkit.memory import NO_LIMIT, FreedMemory, MemoryLimit, keep_freed_memory, map_large_memory, trim
from quantkit.model.blocks import Block, LinearGroup, architecture_of, blocks_of, group_shape, head_dim, state_columns
from quantkit.model.calibration import CalibrationSet
from quantkit.model.forward import BlockRunner
from quantkit.model.room import rounding_bytes
from quantkit.model.scratch import ScratchRoom
from quantkit.model.source import Source
from quantkit.one_block import Job, JobState, Layout, ModelRun, quantize_block, quantize_staged
from quantkit.output import no_space_explained
from quantkit.progress import Progress
from quantkit.quiet import collect_all
from quantkit.recipe import recipe_sha256
from quantkit.streaming import Measuring, stream


def quantize(
    jobs: Sequence[Job],
    source: Source,
    calibration: CalibrationSet | None,
    device: torch.device,
    progress: Progress,
    checkpoints: Checkpoints,
    memory: MemoryLimit = NO_LIMIT,
) -> list[Manifest]:
    """Make every job's artifact in one pass over the model; each appears complete or not at all.

    calibration: the token ids that calibrated methods need; None when no job has one. checkpoints: where the pass goes
    on, and what it leaves to go on with. memory: how much may be held at once; the artifact is the same whatever it
    says. Raises ModelError for a damaged or non-finite model, DataError for a full disk.
    """
    layout = Layout(architecture_of(source.config).norm_offset, head_dim(source.config))
    with ExitStack() as stack:
        for job in jobs:
            stack.enter_context(no_space_explained(job.out))
        how = _arithmetic(jobs, source, device)
        given = {"fingerprint": calibration and calibration.fingerprint, "arithmetic": how.label()}
        folders = checkpoints.begin(len(blocks_of(source)), given)
        states = []
        for job, folder in zip(jobs, folders, strict=True):
            dtype = getattr(torch, job.recipe.model.dtype)
            writer = job.recipe.resolved_format.writer(folder, source, job.plans, dtype)
            methods = {plan.name: plan.method for plan in job.plans if plan.method is not None}
            states.append(JobState(job, writer, folder, dtype, methods, layout))
        in_parts = _in_parts(states, source)
        if any(method.compiled for state in states for method in state.methods.values()):
            stack.enter_context(compiling_told(progress.say))
        arena.allow(None if memory.limit_bytes is None else 0)
        stack.callback(arena.allow, None)  # the limit is this run's
        if memory.limit_bytes is not None or any(state.calibrated for state in states):
            map_large_memory()
        elif not in_parts:
            keep_freed_memory()
        shared_s = _run(states, source, calibration, device, how, memory, in_parts, progress, checkpoints)
        for state in states:
            started = time.perf_counter()
            paths = state.writer.finish()
            state.own_s += time.perf_counter() - started
            manifest = _manifest(state, paths, source, calibration, device, how, state.own_s + shared_s)
            manifest = with_card(manifest, source, state.folder)
            write_manifest(manifest, state.folder)
        checkpoints.finish()
        if memory.limit_bytes is not None and peak_rss_bytes() > memory.limit_bytes:
            progress.say(
                f"note: the process held {peak_rss_bytes() / 1e6:.0f} MB at its peak, more than the limit of "
                f"{memory.limit_bytes / 1e6:.0f} MB; `quantkit plan` tells what takes how much"
            )
        return checkpoints.publish()


def _arithmetic(jobs: Sequence[Job], source: Source, device: torch.device) -> Arithmetic:
    """What the calibration of a pass is computed in; its jobs share their calibration section."""
    exact = any(job.calibrated and job.recipe.calibration.precision == "float32" for job in jobs)
    return arithmetic(device, source.dtype(f"{blocks_of(source)[0].linears[0]}.weight"), exact=exact)


def _run(
    states: list[JobState],
    source: Source,
    calibration: CalibrationSet | None,
    device: torch.device,
    how: Arithmetic,
    memory: MemoryLimit,
    in_parts: bool,
    progress: Progress,
    checkpoints: Checkpoints,
) -> float:
    """The loop. Returns the seconds spent for all jobs together: reading, and running the unquantized model.

    in_parts: as `_in_parts` says.
    """
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
        if memory.limit_bytes is not None:
            collect_all()
    checkpoints.restore(states, run)
    if checkpoints.done:
        progress.say(f"going on behind block {checkpoints.done} of {len(blocks)}")
    own_s = sum(state.own_s for state in states)

    def shared_s() -> float:
        return checkpoints.seconds + time.perf_counter() - started - sum(state.own_s for state in states) + own_s

    title = "quantizing " + ", ".join(state.job.label for state in states)
    with progress.task(title, len(blocks) + 1) as tracker, Measuring() as measuring:
        tracker.advance(checkpoints.done)
        if not checkpoints.done:
            stream(states, source, [name for name in outside if name != f"{head}.weight"], None, device, measuring)
        if run is None:
            for block in blocks[checkpoints.done :]:
                stream(states, source, block.tensors, block, torch.device("cpu"), measuring)
                checkpoints.after_block(block.index + 1, states, run, shared_s())
                if in_parts:
                    trim()
                tracker.advance(note=block.prefix.rstrip("."))
        else:
            for block, tensors in _read(source, blocks[checkpoints.done :], ahead=device.type == "cuda"):
                size = sum(tensor.nbytes for tensor in tensors.values())
                _run_block(states, run, block, tensors, last=block is blocks[-1])
                del tensors
                checkpoints.after_block(block.index + 1, states, run, shared_s())
                run.runner.freed.give_back(0, beside=size)
                tracker.advance(note=block.prefix.rstrip("."))
        if not source.tied_head:
            alone = Block(-1, "", (head,), (LinearGroup((head,)),), (f"{head}.weight",))
            stream(states, source, alone.tensors, alone, device, measuring)
        tracker.advance(note=head)
    return shared_s()


def _in_parts(states: Sequence[JobState], source: Source) -> bool:
    """Whether the largest linear goes through a part at a time. That takes next to nothing, so what the C library keeps
    of freed memory would be most of what is resident."""
    linears = [f"{linear}.weight" for block in blocks_of(source) for linear in block.linears]
    largest = max(linears, key=lambda name: prod(source.shape(name)))
    return not any(state.calibrated for state in states) and all(state.writer.takes_parts(largest) for state in states)


def _start(
    source: Source,
    calibration: CalibrationSet,
    device: torch.device,
    how: Arithmetic,
    memory: MemoryLimit,
    scratch: Path,
) -> ModelRun:
    """Embed the calibration set; hidden states that would take over a quarter of the room go to a scratch file."""
    runner = BlockRunner(source, device, how, FreedMemory(memory.limit_bytes))
    size = calibration.ids.numel() * state_columns(source) * runner.dtype.itemsize
    spill = scratch if size > memory.room_bytes(torch.device("cpu")) // 4 else None
    return ModelRun(runner, memory, runner.embed(calibration.ids, spill), ScratchRoom(scratch))


def _read(source: Source, blocks: Sequence[Block], *, ahead: bool) -> Iterator[tuple[Block, dict[str, Tensor]]]:
    """Each block and its tensors. ahead: read the next one while this one is worked on, which pays where the work is
    done by another device than the reading; it takes the memory of one more block."""

    def tensors(block: Block) -> dict[str, Tensor]:
        return {name: source.read(name) for name in block.tensors}

    if not ahead or not blocks:
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


def _run_block(states: list[JobState], run: ModelRun, block: Block, tensors: dict[str, Tensor], *, last: bool) -> None:
    """One block for every job. Jobs that look at the unquantized model's inputs share them; others have their own.

    tensors: used up, so that none is held longer than it is needed.
    """
    runner = run.runner
    on_device = {name: tensors.pop(name).to(runner.device) for name in list(tensors)}
    followers = [state for state in states if state.calibrated and not state.propagates]
    leaders = [state for state in states if state.calibrated and state.propagates]
    if run.hidden is not None:
        for position, state in enumerate(leaders, 1):
            # the first block's inputs are those of the unquantized model for everyone
            if state.hidden is None:
                state.hidden = run.hidden.copy() if followers or position < len(leaders) else run.hidden
    statistics: dict[Look, dict[str, InputStatistics]] = {}
    with runner.loaded(block, on_device) as module:
        if followers:
            assert run.hidden is not None
            looks = {look for state in followers for look in state.looks}
            statistics = runner.statistics(module, block, run.hidden, advance=not last, looks=looks)
        else:
            run.hidden = None
        others = [state for state in states if state not in leaders]
        for state in leaders:
            own = on_device if state is leaders[-1] and not others else dict(on_device)
            quantize_staged(state, run, module, block, own, last=last)
    for state in others:  # behind the module, whose weights are not wanted any more
        seen = statistics
        if state.calibrated:
            runner.expect(max(rounding_bytes(*group_shape(runner.source, group)) for group in block.groups))
            if state is not followers[-1]:  # who uses them up
                seen = {look: dict(found) for look, found in statistics.items()}
        quantize_block(state, block, on_device, seen)


def _manifest(
    state: JobState,
    paths: Sequence[Path],
    source: Source,
    calibration: CalibrationSet | None,
    device: torch.device,
    how: Arithmetic,
    seconds: float,
) -> Manifest:
    recipe = state.job.recipe
    files = [file_record(path, state.folder) for path in sorted(paths)]
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
        bits_per_weight_all=weight_bytes(files) * 8 / source.parameter_count(),
        files=files,
        environment=environment(device.type),
        inputs=[file_record(path, path.parent) for path in state.job.inputs],
    )
