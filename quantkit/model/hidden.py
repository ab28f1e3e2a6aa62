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

    spill: a folder for the scratch file; None keeps the states in memory.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, spill: Path | None = None):
        self.shape, self.dtype, self.spill = torch.Size(shape), dtype, spill
        self._sequence_bytes = math.prod(self.shape[1:]) * dtype.itemsize
        self._tensor: Tensor | None = None
        if spill is None:
            self._tensor = torch.empty(self.shape, dtype=dtype)
        else:
            self._file = ScratchFile(spill, self.nbytes)

    @property
    def nbytes(self) -> int:
        return self._sequence_bytes * self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        """Sequences `rows`, step 1: a view in memory, a copy from the file."""
        if self._tensor is not None:
            return self._tensor[rows]
        start, stop, _ = rows.indices(self.shape[0])
        found = empty((stop - start, *self.shape[1:]), self.dtype)
        self._file.read(start * self._sequence_bytes, found)
        return found

    def __setitem__(self, rows: slice, values: Tensor) -> None:
        if self._tensor is not None:
            self._tensor[rows] = values
            return
        start, _, _ = rows.indices(self.shape[0])
        self._file.write(start * self._sequence_bytes, values.detach().cpu().to(self.dtype))

    @property
    def storage(self) -> UntypedStorage | None:
        """Where the states lie, None when that is a file."""
        return None if self._tensor is None else self._tensor.untyped_storage()

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
        for position, row in enumerate(picked):
            other[position : position + 1] = self[row : row + 1]
        return other
