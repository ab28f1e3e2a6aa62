"""Rounding with error compensation: each column's error is made up for by the columns that are not rounded yet.

Source: Frantar et al. 2022 (GPTQ), algorithm 1, with static groups: scales and zeros come from the unrounded weight,
so the order in which columns are rounded is free and the codes need no g_idx.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.maths.order import reordered
from quantkit.maths.products import times_transposed
from quantkit.tensors import Grid

BLOCK_COLUMNS = 128
"""Columns that are rounded before the rest is updated by one matrix product: the paper's B."""

RoundBlock = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""A block of columns, their numbers and their part of the factor to codes and errors: see `compensated`."""

INVERTED_WHOLE = 192
"""Rows of a triangle that is inverted at once; below it the products are too small to gain anything."""

LEAST_PIVOT = 1e-4
"""Share of a column's own square that has to be left of it behind those before, for float32 to know it well: rounding
takes 1e-7 of the whole, so a thousandth of this."""

DAMP_STEPS = 5
"""How often the damping is raised tenfold before the Gram matrix is given up."""


@dataclass(frozen=True)
class InverseFactor:
    """What error compensation needs of a Gram matrix.

    upper: float32 [in, in], upper triangular U with U^T U = (H + damping)^-1, rows and columns in `order`.
    order: int64 [in], the column rounded at each step. dead: bool [in], columns that never had an input; they are
    rounded to nearest, since nothing is known of them and other columns cannot make up for them.
    damp: the share of the mean diagonal that was added; larger than asked when the factorization failed with less.
    """

    upper: Tensor
    order: Tensor
    dead: Tensor
    damp: float


def inverse_factor(gram: Tensor, damp: float, act_order: bool) -> InverseFactor:
    """Factor a Gram matrix [in, in] for `round_compensated`.

    damp: share of the mean diagonal added to the diagonal. act_order: round the columns with the largest inputs first.
    With J the reversal, J H J = L L^T gives H = R R^T with R = J L J upper triangular, and U = R^-1.
    Raises ModelError when the matrix stays indefinite at the highest damping, or is not finite.
    """
    diagonal = gram.diagonal()
    if not torch.isfinite(diagonal).all():
        raise ModelError(
            "the Gram matrix of the inputs holds NaN or infinity; expected finite activations",
            hint="the calibration text or the checkpoint drives the model out of range; try another set or dtype",
        )
    dead = diagonal <= 0
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    else:
        order = torch.arange(len(diagonal), device=gram.device)
    backward = order.flip(0)
    live = dead[backward].logical_not()
    ordered = reordered(gram.float(), backward, backward)
    mean = float(ordered.diagonal()[live].mean(dtype=torch.float64)) if bool(live.any()) else 1.0
    ordered.diagonal()[~live] = mean
    undamped = ordered.diagonal().double()
    for _ in range(DAMP_STEPS):
        ordered.diagonal().copy_(undamped + damp * mean)
        inverse = inverse_of_factor(ordered)
        if inverse is not None:
            return InverseFactor(inverse.flip(0, 1), order, dead, damp)
        damp = min(damp * 10, 1.0)
    raise ModelError(
        f"the Gram matrix of the inputs is not positive definite even with {damp:.0%} damping",
        hint="use more calibration sequences, or a calibration set closer to the model's training text",
    )


def inverse_of_factor(matrix: Tensor) -> Tensor | None:
    """L^-1 of a symmetric matrix L L^T, float32 [n, n]; None when it is not positive definite.

    In float32 where that leaves every pivot enough digits, else in float64: a Gram matrix whose largest eigenvalue is
    its whole trace leaves float32 none for the damping.
    """
    inverse = torch.zeros_like(matrix)
    if _invert_factor(matrix.clone(), inverse):
        kept = 1 / (matrix.diagonal() * inverse.diagonal().square())  # share of a column that those before do not tell
        if bool((kept > LEAST_PIVOT).all()):
            return inverse
    del inverse
    lower = _factor(matrix)
    if lower is None:
        return None
    # float: the factor's condition is the root of the matrix's, which float32 inverts well
    whole = torch.zeros_like(matrix)
    _invert_lower(lower.float(), whole)
    return whole


def _factor(matrix: Tensor) -> Tensor | None:
    """L of a symmetric matrix L L^T, float64 [n, n]; None when it is not positive definite."""
    lower, failed = torch.linalg.cholesky_ex(matrix.double())
    return None if int(failed) or not bool(torch.isfinite(lower.diagonal()).all()) else lower


def _invert_factor(matrix: Tensor, inverse: Tensor) -> bool:
    """Write the inverse of the factor of `matrix` [n, n], which is used up, into the zeros of `inverse` by halves;
    false when it is not positive definite.

    The factor itself is not needed. Nearly all of the work is products, which run several times as fast as a
    factorization.
    """
    size = len(matrix)
    if size <= INVERTED_WHOLE:
        lower = _factor(matrix)
        if lower is None:
            return False
        _invert_lower(lower, inverse)
        return True
    half = size // 2
    first, last = slice(half), slice(half, size)
    if not _invert_factor(matrix[first, first], inverse[first, first]):
        return False
    below = times_transposed(matrix[last, first], inverse[first, first])  # of the factor
    matrix[last, last] -= times_transposed(below, below)
    if not _invert_factor(matrix[last, last], inverse[last, last]):
        return False
    _join(inverse, below, half)
    return True


def _join(inverse: Tensor, below: Tensor, half: int) -> None:
    """Fill in what lies below the inverses of a triangle's halves, where the triangle itself has `below`."""
    turned = times_transposed(inverse[half:, half:], below.T)
    inverse[half:, :half] = times_transposed(turned, inverse[:half, :half].T).neg_()


def _invert_lower(lower: Tensor, inverse: Tensor) -> None:
    """Write the inverse of a lower triangular matrix [n, n] into the zeros of `inverse` by halves.

    A solve against the identity, which is what there is, does not know that the right side is triangular too.
    """
    size = len(lower)
    if size <= INVERTED_WHOLE:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        inverse.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = size // 2
    _invert_lower(lower[:half, :half], inverse[:half, :half])
    _invert_lower(lower[half:, half:], inverse[half:, half:])
    _join(inverse, lower[half:, :half], half)


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
