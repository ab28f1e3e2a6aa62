"""Rows of tokens on their way through a block, and where they are while a group of linears is rounded: in memory, in a
scratch file, or nowhere, to start again. What they compute is the same."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quantkit.model.blocks import Block
from quantkit.model.forward import BlockRunner
from quantkit.model.hidden import HiddenStates
from quantkit.model.room import BlockSizes
from quantkit.model.scratch import ScratchFile
from quantkit.model.watching import Arrived, watched_with_states
from quantkit.tensors import let_go

if TYPE_CHECKING:
    from greenlet import greenlet


@dataclass(frozen=True)
class Way:
    """A block's module and the hidden states that go through it."""

    module: nn.Module
    hidden: HiddenStates


_LAST: ContextVar[Arrived | None] = ContextVar("_LAST", default=None)
"""What came to the last group of linears; each row that waits has its own."""


def _let_go_of_read(arrived: Arrived) -> None:
    """Empty what the group before this one has read, and the hidden states before those that came with this one.

    Nothing reads them any more, but functions of the model that are under way still hold them, in as many rows as wait.
    """
    last = _LAST.get()
    if last is not None:
        let_go(last.inputs)
        if last.entered is not None and last.entered is not arrived.entered:
            let_go(last.entered)
    _LAST.set(arrived)


@dataclass(frozen=True)
class Rows:
    """Batches of rows on their way through a block: a greenlet for each way, which stops at every group of linears."""

    runner: BlockRunner
    block: Block
    ways: Sequence[Way]

    def stopped_at_groups(self) -> ExitStack:
        """While this lasts, a greenlet that comes to a group hands what has arrived to whoever switched to it."""
        from greenlet import getcurrent

        def wait(arrived: Arrived) -> None:
            _let_go_of_read(arrived)
            getcurrent().parent.switch(arrived)  # type: ignore[union-attr]

        hooks = ExitStack()
        for way in self.ways:
            for group in self.block.groups:
                hooks.enter_context(watched_with_states(way.module, self.block, group, wait))
        return hooks

    def begin(self, batch: slice) -> list[greenlet]:
        """A greenlet for each way; it runs up to the first group once it is switched to."""
        from greenlet import greenlet

        def through(way: Way) -> Tensor:
            return self.runner.call(way.module, self.block, way.hidden[batch])  # read once it runs

        return [greenlet(partial(through, way)) for way in self.ways]


class InMemory:
    """A batch that waits inside the block where the next group is to be rounded, and goes on with its new weights."""

    def __init__(self, rows: Rows, batch: slice):
        self._rows, self._batch = rows, batch
        self._tasks: list[greenlet] = []

    def bring(self, position: int) -> list[Arrived]:
        """What it brings to the group at a position, on every way; the groups come one after another."""
        if not self._tasks:
            self._begin()
        return [task.switch() for task in self._tasks]

    def leave(self) -> None:
        """What was brought has been seen."""

    def finish(self) -> None:
        """Run to the end of the block and write its outputs over the hidden states."""
        for way, task in zip(self._rows.ways, self._tasks, strict=True):
            way.hidden[self._batch] = task.switch()
        self._tasks = []  # with what came to their last group

    def drop(self) -> None:
        """Let go of what has not come to the end."""
        for task in self._tasks:
            if task:  # it has begun, and not ended
                task.throw()
        self._tasks = []

    def _begin(self, passed: int = 0) -> None:
        """Start, and run past so many groups, up to where the next one is waited for."""
        self._tasks = self._rows.begin(self._batch)
        for _ in range(passed):
            for task in self._tasks:
                task.switch()


class Anew(InMemory):
    """A batch that starts again for every group, which takes no memory, and two to three times the work."""

    def bring(self, position: int) -> list[Arrived]:
        try:
            self._begin(position)
            return super().bring(position)
        finally:
            self.drop()

    def finish(self) -> None:
        try:
            self._begin(len(self._rows.block.groups))
            super().finish()
        finally:
            self.drop()


@dataclass(frozen=True)
class _Away:
    """A tensor that was emptied, what it held being in a file from `start` on."""

    tensor: Tensor
    start: int
    shape: torch.Size


class InFile(InMemory):
    """A batch that waits as well, while what it holds lies in a scratch file, `start` bytes from its beginning on."""

    def __init__(self, rows: Rows, batch: slice, file: ScratchFile, start: int):
        super().__init__(rows, batch)
        self._file, self._start = file, start
        self._away: list[_Away] = []
        self._seen: list[Arrived] = []

    def bring(self, position: int) -> list[Arrived]:
        if position == 0:  # a norm is nothing beside writing what it gives
            return Anew(self._rows, self._batch).bring(position)
        if not self._tasks:
            self._begin(position)
        self._take_back()
        self._seen = super().bring(position)
        return self._seen

    def leave(self) -> None:
        start = self._start
        for tensor in (tensor for arrived in self._seen for tensor in _own(arrived)):
            self._file.write(start, tensor)
            self._away.append(_Away(tensor, start, tensor.shape))
            start += tensor.nbytes
            let_go(tensor)
        self._seen = []

    def finish(self) -> None:
        self._take_back()
        super().finish()

    def drop(self) -> None:
        super().drop()
        self._away, self._seen = [], []

    def _take_back(self) -> None:
        for away in self._away:
            away.tensor.data = self._file.read(away.start, away.shape, away.tensor.dtype)
        self._away = []


def _own(arrived: Arrived) -> list[Tensor]:
    """What a batch that waits holds of its own: hidden states in memory it only looks at."""
    held = [arrived.inputs]
    entered = arrived.entered
    if entered is not None and entered.untyped_storage().nbytes() == entered.nbytes:
        held.append(entered)
    return held


def placed(rows: Rows, sizes: BlockSizes, waiting: int, file: ScratchFile | None) -> list[InMemory]:
    """Every batch of the rows: the first `waiting` sequences wait in memory, the others in a file that takes what
    `sizes` says of them, or start again where there is none."""
    batches: list[InMemory] = []
    for batch in rows.runner.batches(rows.ways[0].hidden):
        if batch.start < waiting:
            batches.append(InMemory(rows, batch))
        elif file is not None:
            batches.append(InFile(rows, batch, file, sizes.file_bytes(batch.start - waiting)))
        else:
            batches.append(Anew(rows, batch))
    return batches
