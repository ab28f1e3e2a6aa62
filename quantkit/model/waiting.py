"""Rows of tokens on their way through a block, and where they are while a group of linears is rounded: in memory, in a
scratch file, or nowhere, to start again. What they compute is the same."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, UntypedStorage, nn

from quantkit.arena import empty
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
    """A block's module and the hidden states that go through it; a batch takes those that it holds while it waits."""

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

    @property
    def shared(self) -> frozenset[int]:
        """Addresses of what rows look at that others do too, or again: hidden states that nobody has taken, and what
        every block is called with."""
        states = [storage for way in self.ways for storage in way.hidden.storages]
        given = [tensor.untyped_storage() for tensor in _tensors(self.runner.arguments(self.block))]
        return frozenset(storage.data_ptr() for storage in [*states, *given])

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

    def begin(self, batch: slice, *, take: bool) -> list[greenlet]:
        """A greenlet for each way; it runs up to the first group once it is switched to. take: the hidden states become
        its own, and go once they were read: it begins but once."""
        from greenlet import greenlet

        def through(way: Way) -> Tensor:
            # read once it runs, and held by the call alone
            return self.runner.call(way.module, self.block, way.hidden.take(batch) if take else way.hidden[batch])

        return [greenlet(partial(through, way)) for way in self.ways]


class InMemory:
    """A batch that waits inside the block where the next group is to be rounded, and goes on with its new weights."""

    takes = True
    """Whether it begins but once, and takes its hidden states."""

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
        """Run to the end of the block and write its outputs in the place of the hidden states."""
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
        self._tasks = self._rows.begin(self._batch, take=self.takes)
        for _ in range(passed):
            for task in self._tasks:
                task.switch()


class Anew(InMemory):
    """A batch that starts again for every group, which takes no memory, and two to three times the work."""

    takes = False

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


class InFile(InMemory):
    """A batch that waits as well, while what it holds lies in a scratch file, in `size` bytes from `start` on; what has
    no room there stays in memory."""

    takes = False  # it begins again behind the first group

    def __init__(self, rows: Rows, batch: slice, file: ScratchFile, start: int, size: int):
        super().__init__(rows, batch)
        self._file, self._start, self._end = file, start, start + size
        self._away: list[_Away] = []

    def bring(self, position: int) -> list[Arrived]:
        if position == 0:  # a norm is nothing beside writing what it gives
            return Anew(self._rows, self._batch).bring(position)
        if not self._tasks:
            self._begin(position)
        self._take_back()
        return super().bring(position)

    def leave(self) -> None:
        start = self._start
        for storage, tensors in held_by(self._tasks, self._rows.shared):
            size = storage.nbytes()
            if start + size <= self._end:
                self._file.write(start, _bytes_of(storage))
                self._away.append(_Away(start, size, [_View.of(tensor) for tensor in tensors]))
                start += size
                for tensor in tensors:
                    let_go(tensor)

    def finish(self) -> None:
        self._take_back()
        super().finish()

    def drop(self) -> None:
        super().drop()
        self._away = []

    def _take_back(self) -> None:
        for away in self._away:
            storage = empty((away.size,), torch.uint8).untyped_storage()
            self._file.read(away.start, _bytes_of(storage))
            for view in away.views:
                view.tensor.set_(storage, view.offset, view.shape, view.stride)
        self._away = []


@dataclass(frozen=True)
class _View:
    """How a tensor looked at its storage."""

    tensor: Tensor
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> _View:
        return cls(tensor, int(tensor.storage_offset()), tensor.shape, tensor.stride())


@dataclass(frozen=True)
class _Away:
    """So many bytes of a storage that are in a file from `start` on, and the tensors that were emptied for it."""

    start: int
    size: int
    views: list[_View]


def held_by(tasks: Sequence[greenlet], shared: Collection[int]) -> list[tuple[UntypedStorage, list[Tensor]]]:
    """What the functions of greenlets that wait hold of tensors on the CPU, by their storages, but for weights and what
    is `shared`, by address."""
    found: dict[int, tuple[UntypedStorage, dict[int, Tensor]]] = {}
    for task in tasks:
        frame = task.gr_frame
        while frame is not None:
            for tensor in _tensors(frame.f_locals.values()):
                storage = tensor.untyped_storage()
                if tensor.device.type == "cpu" and storage.nbytes() and storage.data_ptr() not in shared:
                    found.setdefault(storage.data_ptr(), (storage, {}))[1][id(tensor)] = tensor
            frame = frame.f_back
    return [(storage, list(tensors.values())) for storage, tensors in found.values()]


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter):
                yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def _bytes_of(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def placed(rows: Rows, sizes: BlockSizes, waiting: int, file: ScratchFile | None) -> list[InMemory]:
    """Every batch of the rows: the first `waiting` sequences wait in memory, the others in a file that takes what
    `sizes` says of them, or start again where there is none."""
    batches: list[InMemory] = []
    for batch in rows.runner.batches(rows.ways[0].hidden):
        if batch.start < waiting:
            batches.append(InMemory(rows, batch))
        elif file is not None:
            start, end = (sizes.file_bytes(place - waiting) for place in (batch.start, batch.stop))
            batches.append(InFile(rows, batch, file, start, end - start))
        else:
            batches.append(Anew(rows, batch))
    return batches
