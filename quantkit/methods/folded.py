"""The weights of a block with scales folded into them: as they are stored until someone asks for one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping

import torch
from torch import Tensor

from quantkit.arena import empty_on


class FoldedWeights(MutableMapping[str, Tensor]):
    """{linear: float32 [out, in]} as the weights stand now.

    What is held is the stored tensor, which the run holds as well, beside the scales that were folded into it; a weight
    in float32 is made anew each time. So a block takes what it does in the file, and not two or three times as much,
    until its linears are rounded.
    """

    def __init__(self, stored: Mapping[str, Tensor]):
        self._stored = dict(stored)
        self._factors: dict[str, list[tuple[bool, Tensor]]] = {name: [] for name in stored}

    def __getitem__(self, linear: str) -> Tensor:
        stored = self._stored[linear]
        if stored.dtype == torch.float32 and not self._factors[linear]:
            return stored
        return self.write(linear, empty_on(stored.device, stored.shape))

    def __setitem__(self, linear: str, weight: Tensor) -> None:
        self._stored[linear], self._factors[linear] = weight, []

    def __delitem__(self, linear: str) -> None:
        del self._stored[linear], self._factors[linear]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, linear: object) -> bool:
        return linear in self._stored

    def write(self, linear: str, out: Tensor, rows: slice = slice(None)) -> Tensor:
        """Write some rows of a weight into `out` float32 [rows, in], and return that."""
        out.copy_(self._stored[linear][rows])
        for divide, scale in self._factors[linear]:
            out.div_(scale[rows]) if divide else out.mul_(scale)
        return out

    def multiply_inputs(self, linear: str, scale: Tensor) -> None:
        """Fold a scale float32 [in] into the columns of a weight."""
        self._factors[linear].append((False, scale))

    def divide_outputs(self, linear: str, scale: Tensor) -> None:
        """Divide the rows of a weight by a scale float32 [out]."""
        self._factors[linear].append((True, scale[:, None]))

    def stacked(self, linears: list[str]) -> Tensor:
        """Weights by rows: float32 [sum of out, in]; to be read, since it may be a stored one itself."""
        return self[linears[0]] if len(linears) == 1 else self._every(linears, 1)

    def sampled(self, linears: list[str], count: int) -> Tensor:
        """At most so many rows of weights by rows, at even distances from the first: float32 [rows, in]."""
        return self._every(linears, -(-sum(len(self._stored[name]) for name in linears) // count))

    def _every(self, linears: list[str], step: int) -> Tensor:
        """One of so many rows of weights by rows: float32 [rows, in], a new tensor."""
        lengths = [len(self._stored[name]) for name in linears]
        starts = [-sum(lengths[:at]) % step for at in range(len(lengths))]
        counts = [len(range(start, length, step)) for start, length in zip(starts, lengths, strict=True)]
        first = self._stored[linears[0]]
        whole = empty_on(first.device, (sum(counts), first.shape[1]))
        for name, start, out in zip(linears, starts, whole.split(counts), strict=True):
            self.write(name, out, slice(start, None, step))
        return whole
