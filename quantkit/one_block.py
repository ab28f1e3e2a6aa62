"""What one block does for one job: its methods, what they replace, what is written, what is recorded."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from quantkit.errors import ModelError
from quantkit.formats.base import LinearPlan, Writer, calibrates
from quantkit.manifest import TensorRecord
from quantkit.maths.correction import CorrectionAccumulator
from quantkit.maths.four_bit import shortest_run
from quantkit.maths.gram import Importance, InputStatistics, Look
from quantkit.maths.measure import energies, sqnr_db
from quantkit.memory import MemoryLimit
from quantkit.methods.base import BlockResult, BlockWeights, Method, check_finite, merge
from quantkit.methods.calibrated import CalibratedBlock, grid_of
from quantkit.model.blocks import Block, LinearGroup, group_shape, heads_of
from quantkit.model.forward import BlockRunner
from quantkit.model.hidden import HiddenStates
from quantkit.model.room import BlockSizes, left_behind, running_bytes
from quantkit.model.scratch import ScratchRoom
from quantkit.model.stages import run_staged
from quantkit.model.waiting import Rows, Way, placed
from quantkit.recipe import Recipe
from quantkit.tensors import GroupTensor, on_cpu


@dataclass(frozen=True)
class Job:
    """One artifact to make: a recipe, its plan for this model and the folder it goes to.

    importance: {linear module name: importance of its columns}, where the recipe names a file of it. inputs: files of
    that kind.
    """

    label: str
    recipe: Recipe
    plans: list[LinearPlan]
    out: Path
    importance: Mapping[str, Importance] = field(default_factory=dict)
    inputs: Sequence[Path] = ()

    @property
    def calibrated(self) -> bool:
        return calibrates(self.plans)


@dataclass(frozen=True)
class Layout:
    """What folding scales needs to know of a model."""

    norm_offset: float
    head_dim: int | None


@dataclass
class JobState:
    """A job on its way through the model."""

    job: Job
    writer: Writer
    folder: Path
    dtype: torch.dtype
    methods: dict[str, Method]
    layout: Layout
    records: list[TensorRecord] = field(default_factory=list)
    records_told: int = 0  # how many of them are in the journal
    hidden: HiddenStates | None = None  # its own hidden states, when quantized outputs are propagated
    beside: HiddenStates | None = None  # the unquantized model's, when they run along to correct by
    own_s: float = 0.0

    @property
    def calibrated(self) -> bool:
        return any(method.calibrated for method in self.methods.values())

    @property
    def looks(self) -> set[Look]:
        """What its calibrated methods have to see of their inputs."""
        return {method.look for method in self.methods.values() if method.calibrated}

    @property
    def propagates(self) -> bool:
        return any(getattr(method, "propagate", None) == "quantized" for method in self.methods.values())

    def given(self, block: Block, weights: dict[str, Tensor], others: dict[str, Tensor]) -> BlockWeights:
        """Weights of linears as their methods want them, {linear: [out, in]}, beside other tensors of the block."""
        own = {linear: self.methods[linear] for linear in weights}
        layout = self.layout
        return BlockWeights(block, weights, others, layout.norm_offset, layout.head_dim, self.job.importance, own)

    @property
    def corrects(self) -> bool:
        return any(getattr(method, "correction", 0) > 0 for method in self.methods.values())


@dataclass
class ModelRun:
    """The model on its way through its blocks. hidden: of the unquantized model, None once no job needs them. scratch:
    for rows that wait, of one job after another."""

    runner: BlockRunner
    memory: MemoryLimit
    hidden: HiddenStates | None
    scratch: ScratchRoom


def quantize_staged(
    state: JobState, run: ModelRun, module: nn.Module, block: Block, tensors: dict[str, Tensor], *, last: bool
) -> None:
    """Quantize one block for a job whose linears see inputs that passed everything rounded before them.

    Of the linears that are rounded by their inputs only names and shapes are left in `tensors`.
    """
    started = time.perf_counter()
    runner, hidden = run.runner, state.hidden
    assert hidden is not None
    beside = None
    if state.corrects:
        state.beside = hidden.copy() if state.beside is None else state.beside  # they part behind the first block
        beside = Way(runner.twin(block, tensors), state.beside)
    results, works = _begin(state, run, module, block, tensors)
    sizes = _sizes(state, run, block, tensors)
    sequences = hidden.shape[0]
    waiting = sizes.waiting_sequences(sequences, run.memory.room_bytes(runner.device))
    runner.expect(waiting * sizes.waiting_bytes)
    look = Look.WHOLE if Look.WHOLE in state.looks else Look.PART
    way, rounder = Way(module, hidden), _Rounder(runner.by_codes, runner.arithmetic.linears, works)
    file = run.scratch.take(sizes.file_bytes(sequences - waiting))
    rows = Rows(runner, block, [way] if beside is None else [way, beside])
    run_staged(rows, placed(rows, sizes, waiting, file), rounder, sizes=sizes, advance=not last, look=look)
    del rows
    run.scratch.leave(None if last else file)
    del file  # where it was not left, the disk has that room for what is written now
    results += [work.result() for work in works]
    _finish_block(state, block, tensors, merge(results))
    state.own_s += time.perf_counter() - started


def _sizes(state: JobState, run: ModelRun, block: Block, tensors: Mapping[str, Tensor]) -> BlockSizes:
    runner, hidden, how = run.runner, state.hidden, run.runner.arithmetic
    assert hidden is not None
    shapes = tuple(group_shape(runner.source, group) for group in block.groups)
    heads = heads_of(runner.source.config)
    grids = (grid_of(state.methods.get(linear)) for linear in block.linears)
    run_columns = shortest_run(set(grids), {columns for _, columns in shapes}) if runner.by_codes else None
    running = partial(running_bytes, how, transposed=runner.architecture.transposed)
    return BlockSizes(
        shapes=shapes,
        hidden=hidden.shape[2],
        length=hidden.shape[1],
        heads=heads,
        state_bytes=how.states.itemsize,
        linear_bytes=how.linears.itemsize,
        model_bytes=running(),
        rounded_bytes=running(run=run_columns),
        stored_bytes=tensors[f"{block.linears[0]}.weight"].dtype.itemsize,
        ways=2 if state.corrects else 1,
        device=runner.device.type,
        left_behind=left_behind(runner.architecture, how, runner.device, shapes, heads, hidden.shape[1]),
        states_in_memory=hidden.in_memory,
    )


def _begin(
    state: JobState, run: ModelRun, module: nn.Module, block: Block, tensors: dict[str, Tensor]
) -> tuple[list[BlockResult], list[CalibratedBlock]]:
    """What methods that look at no inputs made of their linears, and those that do with their scales folded.

    The block's module then holds all that, but for linears whose inputs are looked at: none of them runs before it is
    rounded, so the work on them alone has their weights; neither does `tensors`.
    """
    runner, hidden = run.runner, state.hidden
    assert hidden is not None
    results, works, now = _shared_out(state, block, tensors)
    seen = {}
    if any(work.steps.exponents for work in works):
        runner.assign(module, block, now)
        seen = runner.statistics(module, block, hidden.copy(every=looked_at(hidden)), advance=False)[Look.WHOLE]
    looked = {f"{name}.weight" for work in works for name in work.weights}
    # behind the statistics: codes in 8 bits go by the first inputs, which are to be those of the whole run
    runner.assign(module, block, {name: tensor for name, tensor in now.items() if name not in looked})
    for work in works:
        runner.release(module, block, work.weights)
    tensors |= {name: tensors[name].to("meta") for name in looked}
    now.clear()
    for work in works:
        work.fold(seen)
        runner.assign(module, block, work.replaced)
    return results, works


def _shared_out(
    state: JobState, block: Block, tensors: Mapping[str, Tensor]
) -> tuple[list[BlockResult], list[CalibratedBlock], dict[str, Tensor]]:
    """What methods that look at no inputs made of their linears, the work of those that do, and the tensors of the
    block with the former in their places."""
    results, works, now = [], [], dict(tensors)
    for method, given in _shares(state, block, tensors):
        work = method.begin(given)
        if work is not None:
            works.append(work)
        else:
            results.append(method.quantize_block(given, {}))
            made = results[-1].quantized
            now |= {f"{name}.weight": block.oriented(tensor.dequantize()) for name, tensor in made.items()}
    return results, works, now


@dataclass(frozen=True)
class _Rounder:
    """Gives each group of linears to the methods that quantize some of it. by_codes: as the runner has it. dtype: of
    weights that run."""

    by_codes: bool
    dtype: torch.dtype
    works: list[CalibratedBlock]

    def round(
        self, group: LinearGroup, seen: InputStatistics, correction: CorrectionAccumulator | None
    ) -> dict[str, Tensor | GroupTensor]:
        done: dict[str, Tensor | GroupTensor] = {}
        for work in self.works:
            if work.ours(group):
                done |= work.round(group, seen.gram, correction, self.by_codes, self.dtype)
        return done

    def input_scale(self, group: LinearGroup) -> Tensor | None:
        scales = [work.input_scale(group) for work in self.works if work.ours(group)]
        return scales[0] if scales else None


def looked_at(hidden: HiddenStates) -> int:
    """Of how many sequences one is looked at for the scales: a sixteenth, but 1024 tokens where there are as many."""
    return max(1, min(16, hidden.shape[0] * hidden.shape[1] // 1024))


def _shares(state: JobState, block: Block, tensors: Mapping[str, Tensor]) -> Iterator[tuple[Method, BlockWeights]]:
    """Each method of a job with the linears of the block that are its own."""
    by_method: dict[Method, list[str]] = {}
    for linear in block.linears:
        if linear in state.methods:
            by_method.setdefault(state.methods[linear].of_block(), []).append(linear)
    others = {name: tensor for name, tensor in tensors.items() if name.removesuffix(".weight") not in state.methods}
    for method, linears in by_method.items():
        weights = {linear: block.oriented(tensors[f"{linear}.weight"]) for linear in linears}
        yield method, state.given(block, weights, others)


def quantize_block(
    state: JobState,
    block: Block,
    tensors: Mapping[str, Tensor],
    statistics: Mapping[Look, dict[str, InputStatistics]],
) -> None:
    """Quantize one block for one job by statistics that are there already, and are used up: those of linears that are
    done are taken out."""
    started = time.perf_counter()
    results = [
        method.quantize_block(given, statistics[method.look] if method.calibrated else {})
        for method, given in _shares(state, block, tensors)
    ]
    _finish_block(state, block, tensors, merge(results))
    state.own_s += time.perf_counter() - started


def _finish_block(state: JobState, block: Block, tensors: Mapping[str, Tensor], merged: BlockResult) -> None:
    """Write one block of one job, and record what was done to each linear."""
    for name, tensor in tensors.items():
        linear = name.removesuffix(".weight")
        if name.endswith(".weight") and linear in merged.quantized:
            _write_quantized(state, linear, block.oriented(tensor), merged)
        else:
            stored = store(state, name, merged.replaced.get(name, tensor))
            if name.endswith(".weight") and linear in block.linears:
                state.records.append(skipped(linear, stored, tensor.numel()))


def _write_quantized(state: JobState, linear: str, weight: Tensor, result: BlockResult) -> None:
    tensor = result.quantized[linear]
    stored = state.writer.add(f"{linear}.weight", on_cpu(tensor))
    known = linear in result.sqnr_db
    state.records.append(
        TensorRecord(
            name=linear,
            requested=state.methods[linear].label(),
            applied=result.applied[linear],
            bits_per_weight=stored * 8 / weight.numel(),
            sqnr_db=result.sqnr_db[linear] if known else sqnr_db(*energies(weight, tensor.pieces())),
            reason=result.notes.get(linear),
        )
    )


def skipped(linear: str, stored: int, count: int) -> TensorRecord:
    """The record of a linear that is stored as it is. stored: bytes. count: weights."""
    return TensorRecord(name=linear, requested="skip", applied="unquantized", bits_per_weight=stored * 8 / count)


def store(state: JobState, name: str, tensor: Tensor, first_row: int = 0) -> int:
    """Write a tensor that stays unquantized, or rows of it; the writer converts it. Raises ModelError when it is not
    finite or its dtype is too narrow."""
    if tensor.is_floating_point() and tensor.numel():
        check_finite(name, tensor)
        largest = torch.finfo(state.dtype).max
        found = max(float(value.abs()) for value in tensor.aminmax())
        if found > largest:
            raise ModelError(
                f"{name}: values up to {found:.3g} do not fit {state.job.recipe.model.dtype}, "
                f"whose largest is {largest:.6g}",
                hint="--set model.dtype=bfloat16",
            )
    return state.writer.add(name, tensor.cpu(), first_row)
