"""The hidden states that pass from block to block: in memory, or in a scratch file when they are too large for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, UntypedStorage

from quantkit.arena import empty
from quantkit.model.scratch import ScratchFile


class HiddenStates:
    """A tensor [sequences, length, hidden] that is read and written by whole sequences.

    spill: a folder for the scratch file; None keeps the states in memory. together: how many sequences lie in one piece
    there, which can be taken out; None is all of them.
    """

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, spill: Path | None = None, together: int | None = None
    ):
        self.shape, self.dtype, self.spill = torch.Size(shape), dtype, spill
        self.together = max(1, self.shape[0]) if together is None else together
        self._sequence_bytes = math.prod(self.shape[1:]) * dtype.itemsize
        self._file = None if spill is None else ScratchFile(spill, self.nbytes)
        self._pieces: dict[int, Tensor] = {}  # by number, those that were written to and not taken since

    def room_for(self, sequences: int) -> HiddenStates:
        """Others, of so many sequences, in as large pieces, where these are."""
        return HiddenStates((sequences, *self.shape[1:]), self.dtype, self.spill, self.together)

    @property
    def nbytes(self) -> int:
        return self._sequence_bytes * self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        """Sequences `rows`, step 1: a view of a piece in memory, a copy of several or from the file. Raises KeyError
        when some of them are in no piece."""
        start, stop, _ = rows.indices(self.shape[0])
        if self._file is not None:
            found = empty((stop - start, *self.shape[1:]), self.dtype)
            self._file.read(start * self._sequence_bytes, found)
            return found
        parts = [self._pieces[number][own] for number, own, _ in self._parts(start, stop)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __setitem__(self, rows: slice, values: Tensor) -> None:
        start, stop, _ = rows.indices(self.shape[0])
        if self._file is not None:
            self._file.write(start * self._sequence_bytes, values.detach().cpu().to(self.dtype))
            return
        for number, own, theirs in self._parts(start, stop):
            if number not in self._pieces:
                count = min(self.together, self.shape[0] - number * self.together)
                with torch.inference_mode(False):  # it is written to later, in that mode or not
                    self._pieces[number] = empty((count, *self.shape[1:]), self.dtype)
            self._pieces[number][own] = values[theirs]

    def take(self, rows: slice) -> Tensor:
        """The same, for sequences that are a piece; in memory it is no longer held here, until others are written in
        its place. Raises ValueError for those that are none, KeyError when it was taken."""
        start, stop, _ = rows.indices(self.shape[0])
        if self._file is not None:
            return self[rows]
        number = start // self.together
        if (start, stop) != (number * self.together, min((number + 1) * self.together, self.shape[0])):
            raise ValueError(f"sequences {start} to {stop} are no piece of {self.together}")
        return self._pieces.pop(number)  # itself: a view would hold its memory even when it is emptied

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, slice, slice]]:
        """The numbers of pieces that sequences lie in, where they do there, and which of them these are."""
        for number in range(start // self.together, -(-stop // self.together)):
            first = number * self.together
            low, high = max(start, first), min(stop, first + self.together)
            yield number, slice(low - first, high - first), slice(low - start, high - start)

    @property
    def in_memory(self) -> bool:
        """Whether they lie there, and not in a file."""
        return self._file is None

    @property
    def storages(self) -> list[UntypedStorage]:
        """Where states lie in memory."""
        return [piece.untyped_storage() for piece in self._pieces.values()]

    def write_to(self, stream: IO[bytes]) -> None:
        """The states as bytes, sequence after sequence."""
        for row in range(self.shape[0]):
            stream.write(self[row : row + 1].contiguous().view(torch.uint8).numpy().data)

    def read_from(self, stream: IO[bytes]) -> None:
        """The states as `write_to` wrote them. Raises EOFError when there are fewer."""
        for row in range(self.shape[0]):
            data = stream.read(self._sequence_bytes)
            if len(data) < self._sequence_bytes:
                raise EOFError
            values = torch.frombuffer(bytearray(data), dtype=self.dtype)
            self[row : row + 1] = values.view(1, *self.shape[1:])

    def copy(self, every: int = 1) -> HiddenStates:
        """Other storage with the same values, of one sequence in `every`."""
        picked = range(0, self.shape[0], every)
        other = self.room_for(len(picked))
        for position, row in enumerate(picked):
            other[position : position + 1] = self[row : row + 1]
        return other
