"""What needs no calibration: one tensor after another, large ones some rows at a time, through every job to its file.

Memory does not grow with the model: what is held is a part of a tensor, or one whole tensor where a format wants it so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor

from quantkit.manifest import TensorRecord
from quantkit.maths.ggml import SEARCHED
from quantkit.maths.measure import energies, sqnr_db
from quantkit.methods.base import Method
from quantkit.model.blocks import Block, LinearGroup
from quantkit.model.source import PART, Source
from quantkit.one_block import JobState, skipped, store
from quantkit.tensors import BlockTensor, QuantizedTensor, on_cpu


@dataclass
class _Made:
    """What becomes of one tensor in one job, over its parts. energies: of those, as they are computed."""

    stored: int = 0
    count: int = 0
    applied: str = ""
    notes: dict[str, None] = field(default_factory=dict)
    energies: list[Future[tuple[float, float]]] = field(default_factory=list)


class Measuring:
    """Compares what was quantized with its codes in a thread of its own, one part behind the rest of the work."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._last: Future[tuple[float, float]] | None = None

    def __enter__(self) -> Measuring:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def begin(self, weight: Tensor, tensor: QuantizedTensor) -> Future[tuple[float, float]]:
        """The energies of a weight and its error, when they are there."""
        if self._last is not None:
            self._last.result()  # parts that wait are not to pile up
        self._last = self._pool.submit(lambda: energies(weight, tensor.pieces()))
        if isinstance(tensor, BlockTensor) and tensor.type_name in SEARCHED:
            self._last.result()  # decoded by compiled loops, which not every platform can run twice at once
        return self._last


def stream(
    states: Sequence[JobState],
    source: Source,
    names: Sequence[str],
    block: Block | None,
    device: torch.device,
    measuring: Measuring,
) -> None:
    """Read tensors one after another, quantize each for the jobs that plan to, store it as it is for the others, and
    record the linears.

    block: the tensors' own, None outside of blocks. device: where methods compute. Raises ModelError.
    """
    done: list[tuple[str, list[_Made]]] = []
    with _one_thread():
        for name in names:
            linear = name.removesuffix(".weight") if name.endswith(".weight") else ""
            alone = None
            if block is not None and linear in block.linears:
                alone = replace(block, linears=(linear,), groups=(LinearGroup((linear,)),), tensors=(name,))
            made = _through(states, source, name, alone, device, measuring)
            if alone is not None:
                done.append((linear, made))
        for linear, made in done:
            for state, result in zip(states, made, strict=True):
                state.records.append(_record(linear, state.methods.get(linear), result))


def _through(
    states: Sequence[JobState],
    source: Source,
    name: str,
    alone: Block | None,
    device: torch.device,
    measuring: Measuring,
) -> list[_Made]:
    """One tensor through every job. alone: a block of nothing but this linear, None for what is no linear."""
    made = [_Made() for _ in states]
    first_row = 0
    for part in _parts(states, source, name):
        for state, result in zip(states, made, strict=True):
            started = time.perf_counter()
            result.count += part.numel()
            if alone is not None and alone.linears[0] in state.methods:
                _quantize(state, alone, part, first_row, result, device, measuring)
            else:
                result.stored += store(state, name, part, first_row)
            state.own_s += time.perf_counter() - started
        first_row += len(part) if part.dim() else 1
        del part  # before the next one is read
    return made


@contextmanager
def _one_thread() -> Iterator[None]:
    """Have torch's operations run on one thread each, and leave the other cores to what runs beside them: the compiled
    encoders, the measuring and the hashing. Dividing operations of a fraction of a millisecond costs more than it
    gains, most of all where another process is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _parts(states: Sequence[JobState], source: Source, name: str) -> Iterator[Tensor]:
    """A tensor whole, or some rows at a time where it is large and every writer takes that."""
    shape = source.shape(name)
    row = prod(shape[1:])
    if shape and shape[0] * row > PART and all(state.writer.takes_parts(name) for state in states):
        yield from source.in_parts(name, max(1, PART // row))
    else:
        yield source.read(name)


def _quantize(
    state: JobState,
    block: Block,
    part: Tensor,
    first_row: int,
    made: _Made,
    device: torch.device,
    measuring: Measuring,
) -> None:
    """Rows of the one linear of `block`, through the job's method to its writer."""
    (linear,) = block.linears
    weight = block.oriented(part.to(device))
    given = state.given(block, {linear: weight}, {})
    result = state.methods[linear].of_block().quantize_block(given, {})
    tensor = result.quantized[linear]
    made.energies.append(measuring.begin(weight, tensor))
    made.stored += state.writer.add(f"{linear}.weight", on_cpu(tensor), first_row)
    made.applied = result.applied[linear]
    made.notes |= dict.fromkeys([result.notes[linear]] if linear in result.notes else [])


def _record(linear: str, method: Method | None, made: _Made) -> TensorRecord:
    if method is None:
        return skipped(linear, made.stored, made.count)
    found = [part.result() for part in made.energies]
    signal, noise = (sum(part[index] for part in found) for index in (0, 1))
    return TensorRecord(
        name=linear,
        requested=method.label(),
        applied=made.applied,
        bits_per_weight=made.stored * 8 / made.count,
        sqnr_db=sqnr_db(signal, noise),
        reason="; ".join(made.notes) or None,
    )
