"""The factor of an inverse Gram matrix, by which errors of rounded columns are passed on to those that are not rounded.

With H = R R^T, R upper triangular, U = R^-1 gives U^T U = H^-1. U is found by halves from below, nearly all of it by
products, which run several times as fast as a factorization.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.maths.order import reordered
from quantkit.maths.products import times_transposed

INVERTED_WHOLE = 192
"""Rows of a matrix that is factored at once; below it the products are too small to gain anything."""

HALVED = 384
"""Rows of a triangle whose products are worth two of half as many each, a quarter less work: the zeros are left out."""

LEAST_PIVOT = 1e-4
"""Share of a column's own square that has to be left of it beside those behind, for float32 to know it well: rounding
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
    live = dead.logical_not()
    mean = float(diagonal[live].mean(dtype=torch.float64)) if bool(live.any()) else 1.0
    undamped = torch.where(live, diagonal, torch.full_like(diagonal, mean))[order].double()

    def damped() -> Tensor:
        matrix = reordered(gram.float(), order, order)
        matrix.diagonal().copy_(undamped + damp * mean)
        return matrix

    for _ in range(DAMP_STEPS):
        upper = _in_float32(damped())
        if upper is None:
            upper = _in_float64(damped())
        if upper is not None:
            return InverseFactor(upper, order, dead, damp)
        damp = min(damp * 10, 1.0)
    raise ModelError(
        f"the Gram matrix of the inputs is not positive definite even with {damp:.0%} damping",
        hint="use more calibration sequences, or a calibration set closer to the model's training text",
    )


def _in_float32(matrix: Tensor) -> Tensor | None:
    """U of a symmetric matrix float32 [n, n], which is used up; None where that leaves some pivot too few digits, as
    in a Gram matrix whose largest eigenvalue is its whole trace, or where the matrix is not positive definite."""
    diagonal, upper = matrix.diagonal().clone(), torch.empty_like(matrix)
    if not _invert_factor(matrix, upper):
        return None
    kept = 1 / (diagonal * upper.diagonal().square())  # share of a column that those behind do not tell
    return upper if bool((kept > LEAST_PIVOT).all()) else None


def _in_float64(matrix: Tensor) -> Tensor | None:
    """U of a symmetric matrix [n, n] by a factor in float64, float32 [n, n]; None when it is not positive definite."""
    factor = _factor(matrix)
    if factor is None:
        return None
    # float: the factor's condition is the root of the matrix's, which float32 inverts well
    upper = torch.empty_like(matrix)
    _invert_upper(factor.float(), upper)
    return upper


def _factor(matrix: Tensor) -> Tensor | None:
    """R of a symmetric matrix R R^T, float64 [n, n]; None when it is not positive definite."""
    backward, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1).double())
    return None if int(failed) or not bool(torch.isfinite(backward.diagonal()).all()) else backward.flip(0, 1)


def _invert_factor(matrix: Tensor, upper: Tensor) -> bool:
    """Write U of `matrix` [n, n], of which the upper triangle is used up, into `upper`; false when the matrix is not
    positive definite. R itself is needed only where it joins the halves."""
    size = len(matrix)
    if size <= INVERTED_WHOLE:
        factor = _factor(matrix)
        if factor is None:
            return False
        _invert_upper(factor, upper)
        return True
    half = size // 2
    first, last = slice(half), slice(half, size)
    if not _invert_factor(matrix[last, last], upper[last, last]):
        return False
    beside = _times_upper_transposed(matrix[first, last], upper[last, last])  # of R
    _take_square(matrix[first, first], beside)
    if not _invert_factor(matrix[first, first], upper[first, first]):
        return False
    _join(upper, beside)
    return True


def _invert_upper(factor: Tensor, inverse: Tensor) -> None:
    """Write the inverse of an upper triangular matrix [n, n] into `inverse` by halves.

    A solve against the identity, which is what there is, does not know that the right side is triangular too.
    """
    size = len(factor)
    if size <= INVERTED_WHOLE:
        identity = torch.eye(size, dtype=factor.dtype, device=factor.device)
        inverse.copy_(torch.linalg.solve_triangular(factor, identity, upper=True))
        return
    half = size // 2
    _invert_upper(factor[:half, :half], inverse[:half, :half])
    _invert_upper(factor[half:, half:], inverse[half:, half:])
    _join(inverse, factor[:half, half:])


def _join(inverse: Tensor, beside: Tensor) -> None:
    """Fill in what lies beside the inverses of a triangle's halves, where the triangle itself has `beside`."""
    half = len(beside)
    inverse[half:, :half] = 0
    turned = _upper_times(inverse[:half, :half], beside)
    _write_negative_product(turned, inverse[half:, half:], inverse[:half, half:])


def _times_upper_transposed(left: Tensor, upper: Tensor) -> Tensor:
    """left @ upper.T, float32 [m, n], for an upper triangle [n, n]."""
    if len(upper) < HALVED:
        return times_transposed(left, upper)
    half = len(upper) // 2
    parts = times_transposed(left, upper[:half]), times_transposed(left[:, half:], upper[half:, half:])
    return torch.cat(parts, dim=1)


def _upper_times(upper: Tensor, right: Tensor) -> Tensor:
    """upper @ right, float32 [n, m], for an upper triangle [n, n]."""
    turned = right.T.contiguous()
    if len(upper) < HALVED:
        return times_transposed(upper, turned)
    half = len(upper) // 2
    return torch.cat([times_transposed(upper[:half], turned), times_transposed(upper[half:, half:], turned[:, half:])])


def _write_negative_product(left: Tensor, upper: Tensor, out: Tensor) -> None:
    """out = -left @ upper, float32 [m, n], for an upper triangle [n, n]."""
    turned = upper.T.contiguous()
    half = len(upper) // 2 if len(upper) >= HALVED else 0
    if half:
        torch.neg(times_transposed(left[:, :half], turned[:half, :half]), out=out[:, :half])
    torch.neg(times_transposed(left, turned[half:]), out=out[:, half:])


def _take_square(matrix: Tensor, factor: Tensor) -> None:
    """Subtract factor @ factor.T from the upper triangle of `matrix` [n, n]."""
    half = len(matrix) // 2 if len(matrix) >= HALVED else 0
    if half:
        matrix[:half] -= times_transposed(factor[:half], factor)
    matrix[half:, half:] -= times_transposed(factor[half:], factor[half:])
