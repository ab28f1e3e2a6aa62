"""Products of inputs in 8 bits and weights that were rounded to at most 4, for processors with AVX2 and without units
for 8-bit integers.

There are twice as many of them in an instruction as of what `maths/eight_bit.py` multiplies, and the weights are the
very ones of the artifact. Scales of groups of columns have to be told apart, so inputs may have steps of their own
there as well: 64 columns share one, which a large column coarsens for its neighbours alone. ggml's products of Q8_0
inputs do likewise, by 32 (ggml-quants.c).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from quantkit.arena import empty
from quantkit.maths.compiled import readable, writable
from quantkit.maths.eight_bit import TRIED
from quantkit.maths.products import times_transposed
from quantkit.tensors import Grid, GroupTensor, QuantizedTensor

LARGEST_ERROR = 0.025
"""What the products of a token may be off by, as a share of their root mean square, taken over tokens. SmolLM2's are
off by 0.006 to 0.009 on average, by up to 0.034 where large columns leave their neighbours with too few steps: there
balanced columns in 8 bits are nearer."""

LARGEST_BITS = 4

RUNS = (64, 32)
"""Columns that may share a step, the first of these that groups are made of."""

TRIED_ROWS = 256
"""Rows of the weight whose products are looked at, from so many to twice as many where there are more."""


@dataclass(frozen=True)
class FourBitWeight:
    """A linear's weight as codes on a grid, in the order in which they are multiplied.

    codes: int32 [panels, in / 4, 16], four codes in each. scale, offset: float32 [panels, runs, 16], offset being scale
    times zero. bias: float32 [out].
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    bias: Tensor

    def __call__(self, inputs: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """`inputs @ weight.T + bias` for inputs [..., in]: [..., out], both float32 or bfloat16, on the CPU."""
        from quantkit.maths.four_bit_kernel import multiply_runs, round_runs
        from quantkit.maths.int_kernel import blocks_of, tasks_of_block

        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        count, runs = len(rows), self.scale.shape[1]
        codes, steps, sums = (
            empty(rows.shape, torch.int8),
            torch.empty(count, runs),
            torch.empty(count, runs),
        )
        coded = (codes.numpy(), steps.numpy(), sums.numpy())
        round_runs(count, readable(rows), *coded)
        outputs = empty((count, len(self.bias)), dtype)
        tasks = tasks_of_block(count, torch.get_num_threads())
        weight = (part.numpy() for part in (self.codes, self.scale, self.offset, self.bias))
        multiply_runs(
            blocks_of(count) * tasks, codes.view(torch.int32).numpy(), *coded[1:], *weight, writable(outputs), tasks
        )
        return outputs.view(*inputs.shape[:-1], len(self.bias))


def run_length(weight: QuantizedTensor) -> int | None:
    """How many columns of a quantized weight go together; None where it cannot be multiplied by its codes."""
    if not isinstance(weight, GroupTensor) or weight.group_of is not None:
        return None
    return run_of(weight.grid, weight.shape[1])


def run_of(grid: Grid, columns: int) -> int | None:
    """`run_length` of weights [out, columns] on a grid, with groups of columns in order."""
    if grid.bits > LARGEST_BITS:
        return None
    size = grid.group_size or columns
    return next((length for length in RUNS if size % length == 0 == columns % size), None)


def shortest_run(grids: Iterable[Grid | None], columns: Iterable[int]) -> int | None:
    """The shortest run of weights on some grids, of so many columns or so many; None where some of them are not for
    such products, as those on no grid (None) are."""
    each = [None if grid is None else run_of(grid, count) for grid, count in product(grids, columns)]
    known = [run for run in each if run is not None]
    return min(known) if known and len(known) == len(each) else None


def held_bytes(run: int) -> float:
    """Of a weight as it is multiplied: its code, and its share of the run's scale and offset."""
    return 1 + 8 / run


def four_bit_weight(weight: GroupTensor, bias: Tensor | None, inputs: Tensor) -> FourBitWeight | None:
    """A weight that `run_length` knows, for products with inputs like these, [..., in]; None where some of them come
    out too far from those in float32."""
    from quantkit.maths.int_kernel import TILE_COLUMNS

    length = run_length(weight)
    assert length is not None
    rows, columns = weight.shape
    panels = -(-rows // TILE_COLUMNS)

    def laid(numbers: Tensor) -> Tensor:
        """[rows, n, ...] as [panels, n, 16, ...]; what is not there is 0."""
        there = numbers.new_zeros(panels * TILE_COLUMNS, *numbers.shape[1:])
        there[:rows] = numbers
        return there.unflatten(0, (panels, TILE_COLUMNS)).transpose(1, 2).contiguous()

    middle = 2.0 ** (weight.grid.bits - 1) if weight.zero is None else weight.zero
    runs = columns // length // weight.scale.shape[1]
    scale, offset = weight.scale, weight.scale * middle
    made = FourBitWeight(
        laid(weight.codes.unflatten(1, (-1, 4))).view(torch.int32).squeeze(3),
        laid(scale.repeat_interleave(runs, 1)),
        laid(offset.repeat_interleave(runs, 1)),
        torch.zeros(rows) if bias is None else bias.detach().float(),
    )
    return made if _near_enough(made, weight, inputs.detach().reshape(-1, columns)) else None


def _near_enough(made: FourBitWeight, weight: GroupTensor, inputs: Tensor) -> bool:
    """Whether products of a few of the inputs [n, in] and rows are near those in float32."""
    tried = inputs[:: max(1, len(inputs) // TRIED)][:TRIED].float()
    some = slice(None, None, max(1, weight.shape[0] // TRIED_ROWS))
    zero = None if weight.zero is None else weight.zero[some]
    part = GroupTensor(weight.codes[some].contiguous(), weight.scale[some], zero, weight.grid)
    exact = times_transposed(tried, part.dequantize())
    error = ((made(tried) - made.bias)[:, some] - exact).square().mean(1)
    # by tokens: a huge one would be all that there is in a mean over them
    each = torch.where(error == 0, 0.0, error / exact.square().mean(1))
    return bool(each.mean() <= LARGEST_ERROR**2)
