"""The rows and columns of a matrix in another order, and the two triangles of a symmetric one."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.arena import empty_on
from quantkit.maths.products import strips


def reordered(matrix: Tensor, columns: Tensor, rows: Tensor | None = None) -> Tensor:
    """`matrix[rows][:, columns]`: [rows, columns] of the matrix's dtype.

    columns, rows: int64, numbers of the matrix's own; None for all rows as they are. On a CPU PyTorch takes the numbers
    of a row one by one and by one thread, ten times as long.
    """
    if matrix.device.type != "cpu":
        return (matrix if rows is None else matrix.index_select(0, rows)).index_select(1, columns)
    from quantkit.maths.order_kernel import pick

    if rows is None:
        rows = torch.arange(len(matrix), device=matrix.device)
    out = empty_on(matrix.device, (len(rows), len(columns)), matrix.dtype)
    pick(len(rows), matrix.contiguous().numpy(), rows.numpy(), columns.numpy(), out.numpy())
    return out


def reorder_upper(matrix: Tensor, order: Tensor) -> None:
    """Write `symmetric[order][:, order]` over what is above the diagonal of `matrix` [n, n], where `symmetric` has the
    lower triangle of `matrix`, which stays. The diagonal is neither read nor written. order: int64 [n]."""
    if matrix.device.type == "cpu":
        from quantkit.maths.order_kernel import pick_upper

        pick_upper(len(matrix), matrix.numpy(), order.numpy())
        return
    symmetric = matrix.tril(-1)
    for strip in strips(len(matrix)):
        symmetric[strip, strip] += symmetric[strip, strip].T.clone()
        symmetric[strip, strip.stop :] = symmetric[strip.stop :, strip].T
    for axis in (0, 1):  # each lets go of what came before
        symmetric = symmetric.index_select(axis, order)
    matrix.tril_().add_(symmetric.triu_(1))


def mirror(matrix: Tensor, *, upper: bool = True) -> None:
    """Write the upper triangle of `matrix` [n, n], contiguous, over the lower one, or the lower over the upper one."""
    if matrix.device.type == "cpu":
        from quantkit.maths.order_kernel import SQUARE, mirror_bands

        mirror_bands(-(-len(matrix) // SQUARE), matrix.numpy(), upper)
        return
    given = matrix if upper else matrix.T
    for strip in strips(len(given)):
        own = given[strip, strip]
        own.copy_(own.triu() + own.triu(1).T)
        given[strip.stop :, strip] = given[strip, strip.stop :].T
