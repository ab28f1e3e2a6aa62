"""The hidden states that pass from block to block: in memory, or in a scratch file when they are too large for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, UntypedStorage

from quantkit.arena import empty
from quantkit.model.scratch import ScratchFile


class HiddenStates:
    """A tensor [sequences, length, hidden] that is read and written by whole sequences.

    spill: a folder for the scratch file; None keeps the states in memory, in the pieces that they are written in, each
    of which can be taken out.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, spill: Path | None = None):
        self.shape, self.dtype, self.spill = torch.Size(shape), dtype, spill
        self._sequence_bytes = math.prod(self.shape[1:]) * dtype.itemsize
        self._pieces: dict[int, Tensor] = {}  # by their first sequence
        self._file = None if spill is None else ScratchFile(spill, self.nbytes)

    @property
    def nbytes(self) -> int:
        return self._sequence_bytes * self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        """Sequences `rows`, step 1: a view of a piece in memory, a copy of several or from the file. Raises KeyError
        when some were taken, or never written to memory."""
        start, stop, _ = rows.indices(self.shape[0])
        if self._file is not None:
            found = empty((stop - start, *self.shape[1:]), self.dtype)
            self._file.read(start * self._sequence_bytes, found)
            return found
        parts = [self._pieces[first][max(start - first, 0) : stop - first] for first in self._overlapping(start, stop)]
        if sum(map(len, parts)) != stop - start:
            raise KeyError(f"sequences {start} to {stop} are not all there")
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __setitem__(self, rows: slice, values: Tensor) -> None:
        start, stop, _ = rows.indices(self.shape[0])
        if self._file is not None:
            self._file.write(start * self._sequence_bytes, values.detach().cpu().to(self.dtype))
            return
        piece = self._pieces.get(start)
        if piece is None or len(piece) != stop - start:
            self._forget(start, stop)
            with torch.inference_mode(False):  # it is written to later, in that mode or not
                piece = self._pieces[start] = empty((stop - start, *self.shape[1:]), self.dtype)
        piece.copy_(values)

    def take(self, rows: slice) -> Tensor:
        """The same sequences; those in memory are no longer held here, until others are written in their place."""
        start, stop, _ = rows.indices(self.shape[0])
        whole = self._pieces.get(start)
        # itself, since a view would hold its memory even when it is emptied
        found = whole if whole is not None and len(whole) == stop - start else self[rows]
        self._forget(start, stop)
        return found

    def _overlapping(self, start: int, stop: int) -> list[int]:
        """Where pieces begin that hold some of these sequences, in order."""
        return [first for first, piece in sorted(self._pieces.items()) if first < stop and start < first + len(piece)]

    def _forget(self, start: int, stop: int) -> None:
        for first in self._overlapping(start, stop):
            piece = self._pieces.pop(first)
            if first < start:
                self._pieces[first] = piece[: start - first]
            if first + len(piece) > stop:
                self._pieces[stop] = piece[stop - first :]

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
        other = HiddenStates((len(picked), *self.shape[1:]), self.dtype, self.spill)
        if every == 1 and self._file is None:
            for first, piece in self._pieces.items():
                other[first : first + len(piece)] = piece
            return other
        for position, row in enumerate(picked):
            other[position : position + 1] = self[row : row + 1]
        return other
