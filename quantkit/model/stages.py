"""Running a block in stages: each group of linears is rounded by inputs that have passed all rounded before it.

Rows of tokens run in greenlets, which wait inside the block where a group is to be rounded, and go on with its new
weights, so that next to nothing runs twice (model/waiting.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from quantkit.arena import empty_on
from quantkit.maths.correction import CorrectionAccumulator
from quantkit.maths.gram import Accumulator, InputStatistics, Look
from quantkit.model.blocks import LinearGroup, group_shape
from quantkit.model.forward import BlockRunner
from quantkit.model.room import BlockSizes
from quantkit.model.waiting import InMemory, Rows
from quantkit.model.watching import Arrived
from quantkit.tensors import GroupTensor


class Rounder(Protocol):
    """What each group of linears is given to, once what was seen of its input is known."""

    def round(
        self, group: LinearGroup, seen: InputStatistics, correction: CorrectionAccumulator | None
    ) -> Mapping[str, Tensor | GroupTensor]:
        """What the linears of the group are rounded to, by full name: weights [out, in] of any float dtype, or codes of
        them."""

    def input_scale(self, group: LinearGroup) -> Tensor | None:
        """float32 [in], what was divided out of the group's inputs; None when nothing was."""


def run_staged(
    rows: Rows,
    batches: Sequence[InMemory],
    rounder: Rounder,
    *,
    sizes: BlockSizes,
    advance: bool,
    look: Look = Look.WHOLE,
) -> None:
    """For each group of a block in turn: statistics of its inputs over all batches, then `rounder`, whose weights take
    their place in the module of the first way of `rows`.

    A second way is that of the unquantized block and its own hidden states, which run along where `rounder` wants to
    know how far the inputs have moved from theirs. advance: write the outputs in the place of the hidden states; else
    those of batches that wait in memory are gone. look: what the statistics are to hold. The result is the same
    wherever batches wait.
    """
    runner = rows.runner
    # one mode around all rows: each restores at its end what it found at its start, and they overlap
    unmixed = torch.autocast(runner.device.type, dtype=runner.arithmetic.linears, enabled=False)
    with torch.inference_mode(), unmixed, rows.stopped_at_groups():
        try:
            for position, group in enumerate(rows.block.groups):
                _round_group(rows, group, rounder, look, sizes, _brought(batches, position))
            if advance:
                for batch in batches:
                    batch.finish()
        finally:
            for batch in batches:
                batch.drop()


def _brought(batches: Sequence[InMemory], position: int) -> Iterator[Sequence[Arrived]]:
    """What each batch brings to a group; it leaves once the next one is asked for."""
    for batch in batches:
        yield batch.bring(position)
        batch.leave()


def _round_group(
    rows: Rows, group: LinearGroup, rounder: Rounder, look: Look, sizes: BlockSizes, inputs: Iterator[Sequence[Arrived]]
) -> None:
    """inputs: batches of those behind what was rounded and, where it runs along, of the unquantized block's."""
    runner, way = rows.runner, rows.ways[0]
    accumulator = runner.accumulator(group, look, way.hidden)
    correction = _add_inputs(runner, accumulator, inputs, rounder.input_scale(group))
    runner.expect(sizes.rounding_bytes(*group_shape(runner.source, group)))
    rounded = rounder.round(group, accumulator.result(), correction)
    del accumulator, correction  # a Gram matrix is not held while weights are laid out to run
    runner.assign_rounded(way.module, rows.block, rounded)
    del rounded
    runner.expect(sizes.batch_bytes)  # what rounding left would lie beside the next batch


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
        apart = None
        if there.states is not None and here.states is not None:
            apart = empty_on(runner.device, here.states.shape, here.states.dtype)
            torch.sub(there.states, here.states, out=apart)
        correction.add(there.inputs, rows, apart)
    return correction
