"""Rounding with error compensation: each column's error is made up for by the columns that are not rounded yet.

Source: Frantar et al. 2022 (GPTQ), algorithm 1, with static groups: scales and zeros come from the unrounded weight,
so the order in which columns are rounded is free and the codes need no g_idx. The algorithm moves the columns that are
left after each one, by a factor of the inverse Gram matrix. Here, with R of the matrix itself (`maths/gram_factor.py`)
and D the errors so far, column k is aimed at w_k + (D R)_k / R_kk, which is the same number.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from quantkit.arena import empty, empty_on, packed
from quantkit.maths.gram_factor import GramFactor
from quantkit.maths.order import reordered
from quantkit.maths.products import add_times_transposed, product_bands
from quantkit.tensors import Grid

BLOCK_COLUMNS = 128
"""Columns that are rounded before the rest is updated by one matrix product: the paper's B."""

RoundBlock = Callable[[slice, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Which rows, a block of their columns, what is owed to them, their numbers and their part of the factor to codes and
errors: see `compensated`."""


def round_compensated(weight: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid, factor: GramFactor) -> Tensor:
    """Codes uint8 [out, in] of a weight [out, in] on a given grid, errors compensated column by column.

    scale: float32 [out, groups]. zero: uint8 [out, groups] or None. Linears that share inputs may be stacked by rows.
    """
    size = grid.group_size or weight.shape[1]
    scale = scale.contiguous()
    middle = torch.full_like(scale, float(2 ** (grid.bits - 1))) if zero is None else zero.float()

    def rounded(rows: slice, weight: Tensor, owed: Tensor, at: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        return _round_block(weight, owed, scale[rows], middle[rows], at // size, upper, grid.levels)

    return compensated(weight, factor, rounded)


def compensated(weight: Tensor, factor: GramFactor, round_block: RoundBlock) -> Tensor:
    """Codes uint8 [out, in] of a weight [out, in], a block of columns rounded at a time, errors passed on to the rest.

    round_block: from the numbers of some rows, a block of the weight float32 [rows, columns], the columns of D R that
    the errors before it give float32 [rows, columns], the numbers of its columns int64 [columns] and its block of the
    factor float32 [columns, columns] to codes uint8 [rows, columns] and errors D float32 [rows, columns], the weight
    less what the codes stand for. It may overwrite the second and third.
    """
    codes = empty_on(weight.device, weight.shape, torch.uint8)
    back = torch.argsort(factor.order)
    for rows in product_bands(weight):
        found = _compensated_rows(weight[rows], factor, partial(round_block, rows))
        codes[rows] = reordered(found, back)
    return codes


def _compensated_rows(weight: Tensor, factor: GramFactor, round_block: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
    """Codes of some rows in the order of rounding: uint8 [rows, in]."""
    columns, order = weight.shape[1], factor.order
    # the weight itself is brought to that order a block at a time, so that no copy of it is held
    codes = empty_on(weight.device, weight.shape, torch.uint8)
    owed = empty_on(weight.device, weight.shape).zero_()
    for start in range(0, columns, BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, columns)
        part = slice(start, end)
        own = reordered(weight, order[part]).float()
        upper = factor.upper[part, part].triu()
        codes[:, part], error = round_block(own, packed(owed[:, part]), order[part], upper)
        if end < columns:
            add_times_transposed(owed[:, end:], error, factor.upper[part, end:].T)
    return codes


def _round_block(
    weight: Tensor, owed: Tensor, scale: Tensor, middle: Tensor, group: Tensor, upper: Tensor, levels: int
) -> tuple[Tensor, Tensor]:
    """Codes uint8 and errors float32, both [out, columns], of one block of columns.

    scale, middle: [out, groups]. group: int64 [columns], the group of each column.
    """
    if weight.device.type != "cpu":
        return _round_block_tensors(weight, owed, scale, middle, group, upper, levels)
    from quantkit.maths.kernels import bands_of, round_block

    codes, errors = empty(weight.shape, torch.uint8), empty(weight.shape)
    steps, middles, lower = (tensor.T.contiguous().numpy() for tensor in (scale, middle, upper))
    given = (weight.numpy(), owed.numpy(), steps, middles, group.numpy(), lower, levels)
    round_block(bands_of(len(weight)), *given, codes.numpy(), errors.numpy())
    return codes, errors


def _round_block_tensors(
    weight: Tensor, owed: Tensor, scale: Tensor, middle: Tensor, group: Tensor, upper: Tensor, levels: int
) -> tuple[Tensor, Tensor]:
    """The same for any device, a tensor operation a column."""
    scale, middle = scale[:, group], middle[:, group]  # [out, columns]
    codes, errors = torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight)
    for j in range(weight.shape[1]):
        wanted = weight[:, j] + owed[:, j] / upper[j, j]
        code = torch.round(wanted / scale[:, j] + middle[:, j]).clamp_(0, levels - 1)
        codes[:, j] = code.to(torch.uint8)
        errors[:, j] = weight[:, j] - (code - middle[:, j]) * scale[:, j]
        if j + 1 < weight.shape[1]:
            owed[:, j + 1 :].addr_(errors[:, j], upper[j, j + 1 :])
    return codes, errors
