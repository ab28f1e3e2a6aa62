"""Rounding with error compensation: each column's error is made up for by the columns that are not rounded yet.

Source: Frantar et al. 2022 (GPTQ), algorithm 1, with static groups: scales and zeros come from the unrounded weight,
so the order in which columns are rounded is free and the codes need no g_idx.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantkit.maths.inverse_factor import InverseFactor
from quantkit.maths.order import reordered
from quantkit.maths.products import times_transposed
from quantkit.tensors import Grid

BLOCK_COLUMNS = 128
"""Columns that are rounded before the rest is updated by one matrix product: the paper's B."""

RoundBlock = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""A block of columns, their numbers and their part of the factor to codes and errors: see `compensated`."""


def round_compensated(weight: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid, factor: InverseFactor) -> Tensor:
    """Codes uint8 [out, in] of a weight [out, in] on a given grid, errors compensated column by column.

    scale: float32 [out, groups]. zero: uint8 [out, groups] or None. Linears that share inputs may be stacked by rows.
    """
    size = grid.group_size or weight.shape[1]
    scale = scale.contiguous()
    middle = torch.full_like(scale, float(2 ** (grid.bits - 1))) if zero is None else zero.float()

    def rounded(work: Tensor, at: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        return _round_block(work, scale, middle, at // size, upper, grid.levels)

    return compensated(weight, factor, rounded)


def compensated(weight: Tensor, factor: InverseFactor, round_block: RoundBlock) -> Tensor:
    """Codes uint8 [out, in] of a weight [out, in], a block of columns rounded at a time, errors passed on to the rest.

    round_block: from a block of the weight float32 [out, columns], which it may overwrite, the numbers of its columns
    int64 [columns] and its part of the factor float32 [columns, columns] to codes uint8 [out, columns] and errors
    float32 [out, columns], each divided by its diagonal element of the factor.
    """
    columns, order = weight.shape[1], factor.order
    work = reordered(weight.float(), order)  # [out, in], in the order of rounding
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    for start in range(0, columns, BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, columns)
        upper = factor.upper[start:end, start:end].contiguous()
        codes[:, start:end], error = round_block(work[:, start:end].contiguous(), order[start:end], upper)
        if end < columns:
            work[:, end:] -= times_transposed(error, factor.upper[start:end, end:].T)
    return reordered(codes, torch.argsort(order))


def _round_block(
    work: Tensor, scale: Tensor, middle: Tensor, group: Tensor, upper: Tensor, levels: int
) -> tuple[Tensor, Tensor]:
    """Codes uint8 and scaled errors float32, both [out, columns], of one block of columns; `work` is used up.

    scale, middle: [out, groups]. group: int64 [columns], the group of each column.
    """
    if work.device.type != "cpu":
        return _round_block_tensors(work, scale, middle, group, upper, levels)
    from quantkit.maths.kernels import round_block

    codes, errors = torch.empty(work.shape, dtype=torch.uint8), torch.empty_like(work)
    steps, middles, lower = (tensor.T.contiguous().numpy() for tensor in (scale, middle, upper))
    round_block(work.numpy(), steps, middles, group.numpy(), lower, levels, codes.numpy(), errors.numpy())
    return codes, errors


def _round_block_tensors(
    work: Tensor, scale: Tensor, middle: Tensor, group: Tensor, upper: Tensor, levels: int
) -> tuple[Tensor, Tensor]:
    """The same for any device, a tensor operation a column."""
    scale, middle = scale[:, group], middle[:, group]  # [out, columns]
    codes, errors = torch.empty_like(work, dtype=torch.uint8), torch.empty_like(work)
    for j in range(work.shape[1]):
        column = work[:, j]
        code = torch.round(column / scale[:, j] + middle[:, j]).clamp_(0, levels - 1)
        error = (column - (code - middle[:, j]) * scale[:, j]) / upper[j, j]
        codes[:, j] = code.to(torch.uint8)
        errors[:, j] = error
        if j + 1 < work.shape[1]:
            work[:, j + 1 :].addr_(error, upper[j, j + 1 :], alpha=-1.0)
    return codes, errors
