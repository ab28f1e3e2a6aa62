"""Running a block in stages: each group of linears is rounded by inputs that have passed all rounded before it.

Rows of tokens run in greenlets. As many as there is room for wait inside the block where a group is to be rounded, and
go on with its new weights, so that for them nothing runs twice; the others start again for every group, which gives the
same numbers in less memory and two to three times the work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from quantkit.maths.correction import CorrectionAccumulator
from quantkit.maths.gram import Accumulator, InputStatistics, Look
from quantkit.model.blocks import Block, LinearGroup, group_shape
from quantkit.model.forward import BlockRunner
from quantkit.model.hidden import HiddenStates
from quantkit.model.room import BlockSizes
from quantkit.model.watching import Arrived, watched_with_states
from quantkit.tensors import GroupTensor

if TYPE_CHECKING:
    from greenlet import greenlet


class Rounder(Protocol):
    """What each group of linears is given to, once what was seen of its input is known."""

    def round(
        self, group: LinearGroup, seen: InputStatistics, correction: CorrectionAccumulator | None
    ) -> Mapping[str, Tensor | GroupTensor]:
        """What the linears of the group are rounded to, by full name: weights float32 [out, in], or codes of them."""

    def input_scale(self, group: LinearGroup) -> Tensor | None:
        """float32 [in], what was divided out of the group's inputs; None when nothing was."""


@dataclass(frozen=True)
class Way:
    """A block's module and the hidden states that go through it."""

    module: nn.Module
    hidden: HiddenStates


def run_staged(
    runner: BlockRunner,
    block: Block,
    way: Way,
    rounder: Rounder,
    *,
    sizes: BlockSizes,
    waiting: int,
    advance: bool,
    beside: Way | None = None,
    look: Look = Look.WHOLE,
) -> None:
    """For each group of a block in turn: statistics of its inputs over all rows, then `rounder`, whose weights take
    their place in the module of `way`.

    waiting: how many sequences wait, the first ones; the result is the same whatever it is. advance: write the outputs
    over the hidden states. beside: the unquantized block and its own hidden states, which run along where `rounder`
    wants to know how far the inputs have moved from theirs. look: what the statistics are to hold.
    """
    rows = _Rows(runner, block, [way] if beside is None else [way, beside])
    batches = list(runner.batches(way.hidden))
    stay = [batch for batch in batches if batch.start < waiting]
    again = batches[len(stay) :]
    # one mode around all rows: each restores at its end what it found at its start, and they overlap
    unmixed = torch.autocast(runner.device.type, dtype=runner.arithmetic.linears, enabled=False)
    with torch.inference_mode(), unmixed, rows.stopped_at_groups():
        under_way = [rows.begin(batch) for batch in stay]
        try:
            for position, group in enumerate(block.groups):
                brought = ([task.switch() for task in tasks] for tasks in under_way)
                anew = (rows.arrived_at(position, batch) for batch in again)
                _round_group(runner, way, block, group, rounder, look, sizes, chain(brought, anew))
            if advance:
                for batch, tasks in zip(stay, under_way, strict=True):
                    rows.finish(batch, tasks)
                for batch in again:
                    rows.finish_anew(batch)
        finally:
            for tasks in under_way:
                rows.drop(tasks)


_READ: ContextVar[Tensor | None] = ContextVar("_READ", default=None)
"""The inputs that the last group of linears has read; each row that waits has its own."""


def _let_go_of_read(inputs: Tensor) -> None:
    """Empty what the group before this one has read, now that `inputs` have come to this one: nothing else reads it,
    but functions of the model that are under way still hold it, in as many rows as wait."""
    read = _READ.get()
    if read is not None:
        read.set_()
    _READ.set(inputs)


@dataclass(frozen=True)
class _Rows:
    """Batches of rows on their way through a block: a greenlet for each way, which stops at every group of linears."""

    runner: BlockRunner
    block: Block
    ways: Sequence[Way]

    def stopped_at_groups(self) -> ExitStack:
        """While this lasts, a greenlet that comes to a group hands what has arrived to whoever switched to it."""
        from greenlet import getcurrent

        def wait(arrived: Arrived) -> None:
            _let_go_of_read(arrived.inputs)
            getcurrent().parent.switch(arrived)  # type: ignore[union-attr]

        hooks = ExitStack()
        for way in self.ways:
            for group in self.block.groups:
                hooks.enter_context(watched_with_states(way.module, self.block, group, wait))
        return hooks

    def begin(self, batch: slice) -> list[greenlet]:
        from greenlet import greenlet

        def through(way: Way) -> Tensor:
            return self.runner.call(way.module, self.block, way.hidden[batch])  # read once it runs

        return [greenlet(partial(through, way)) for way in self.ways]

    def pass_groups(self, tasks: Sequence[greenlet], count: int) -> None:
        """Run past the first `count` groups, up to where the next one is waited for."""
        for _ in range(count):
            for task in tasks:
                task.switch()

    def arrived_at(self, position: int, batch: slice) -> list[Arrived]:
        """What a batch that starts anew brings to a group; it runs no further."""
        tasks = self.begin(batch)
        try:
            self.pass_groups(tasks, position)
            return [task.switch() for task in tasks]
        finally:
            self.drop(tasks)

    def finish(self, batch: slice, tasks: Sequence[greenlet]) -> None:
        """Run to the end of the block and write its outputs over the hidden states."""
        for way, task in zip(self.ways, tasks, strict=True):
            way.hidden[batch] = task.switch()

    def finish_anew(self, batch: slice) -> None:
        """`finish` for a batch that starts anew."""
        tasks = self.begin(batch)
        try:
            self.pass_groups(tasks, len(self.block.groups))
            self.finish(batch, tasks)
        finally:
            self.drop(tasks)

    def drop(self, tasks: Sequence[greenlet]) -> None:
        for task in tasks:
            if task:  # it has begun, and not ended
                task.throw()


def _round_group(
    runner: BlockRunner,
    way: Way,
    block: Block,
    group: LinearGroup,
    rounder: Rounder,
    look: Look,
    sizes: BlockSizes,
    inputs: Iterator[Sequence[Arrived]],
) -> None:
    """inputs: batches of those behind what was rounded and, where it runs along, of the unquantized block's."""
    accumulator = runner.accumulator(group, look, way.hidden)
    correction = _add_inputs(runner, accumulator, inputs, rounder.input_scale(group))
    runner.expect(sizes.rounding_bytes(*group_shape(runner.source, group)))
    rounded = rounder.round(group, accumulator.result(), correction)
    del accumulator, correction  # a Gram matrix is not held while weights are laid out to run
    runner.assign_rounded(way.module, block, rounded)


def _add_inputs(
    runner: BlockRunner, accumulator: Accumulator, inputs: Iterable[Sequence[Arrived]], scale: Tensor | None
) -> CorrectionAccumulator | None:
    """Give batches of inputs to an accumulator and, where the unquantized block runs along, to one of a correction.

    scale: float32 [in], what was divided out of the inputs.
    """
    correction = None
    for arrived in inputs:
        correction = _add_batch(runner, accumulator, correction, scale, *arrived)
        del arrived  # not held while the next batch is on its way
    return correction


def _add_batch(
    runner: BlockRunner,
    accumulator: Accumulator,
    correction: CorrectionAccumulator | None,
    scale: Tensor | None,
    here: Arrived,
    *beside: Arrived,
) -> CorrectionAccumulator | None:
    rows = here.inputs
    accumulator.add(rows)
    for there in beside:
        if correction is None:
            how = runner.arithmetic
            correction = CorrectionAccumulator(
                rows.shape[-1], runner.device, how.linears, scale, eight_bit=how.eight_bit_gram
            )
        apart = None if there.states is None or here.states is None else there.states - here.states
        correction.add(there.inputs, rows, apart)
    return correction
