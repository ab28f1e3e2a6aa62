"""The factor of a Gram matrix, by which errors of rounded columns are passed on to those that are not rounded.

H = R R^T with R upper triangular, so that columns are taken in their order. The loss of an error D of the weight is
then `|D R|^2`, and element k of `D R` knows no column behind k: rounding can go from the first column to the last and
bring each element as near to 0 as its grid allows. That is GPTQ, whose own description takes a factor of the inverse of
H (`maths/compensate.py`); that the two are the same is shown by Chen et al. 2025, The Geometry of LLM Quantization:
GPTQ as Babai's Nearest Plane Algorithm. Nothing is inverted here but small blocks on the diagonal; the inverse was half
of the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.arena import empty_on
from quantkit.errors import ModelError
from quantkit.maths.order import mirror, reorder_upper
from quantkit.maths.products import add_times_transposed, times_transposed

FACTORED_WHOLE = 192
"""Rows of a matrix that is factored at once; below it the products are too small to gain anything."""

HALVED = 384
"""Rows of a square whose product is worth two of half as many, a quarter less work: the triangle below is left out."""

LEAST_PIVOT = 1e-4
"""Share of a column's own square that has to be left of it beside those behind, for float32 to know it well: rounding
takes 1e-7 of the whole, so a thousandth of this."""

DAMP_STEPS = 5
"""How often the damping is raised tenfold before the Gram matrix is given up."""


@dataclass(frozen=True)
class GramFactor:
    """What error compensation needs of a Gram matrix.

    upper: float32 [in, in], R with R R^T = H + damping on and above its diagonal, rows and columns in `order`; what is
    below it is no part of it. order: int64 [in], the column rounded at each step. dead: bool [in], columns that never
    had an input; they are rounded to nearest, since nothing is known of them and other columns cannot make up for them.
    damp: the share of the mean diagonal that was added; larger than asked when the factorization failed with less.
    """

    upper: Tensor
    order: Tensor
    dead: Tensor
    damp: float


@contextmanager
def factored(gram: Tensor, damp: float, act_order: bool) -> Iterator[GramFactor]:
    """The factor of a Gram matrix [in, in] for `round_compensated`. It lies over the upper triangle of `gram` while
    this lasts, so that a matrix as large as any weight is not there twice; the lower one gives the rest back at the
    end. (One that is not float32 or not contiguous is left alone.) Not for tensors of inference mode outside of it.

    damp: share of the mean diagonal added to the diagonal. act_order: round the columns with the largest inputs first.
    Raises ModelError when the matrix stays indefinite at the highest damping, or is not finite.
    """
    matrix = gram.float().contiguous()
    diagonal = matrix.diagonal().clone()
    if not torch.isfinite(diagonal).all():
        raise ModelError(
            "the Gram matrix of the inputs holds NaN or infinity; expected finite activations",
            hint="the calibration text or the checkpoint drives the model out of range; try another set or dtype",
        )
    try:
        yield _factor_in_place(matrix, diagonal, damp, act_order)
    finally:
        matrix.diagonal().copy_(diagonal)
        mirror(matrix, upper=False)


def _factor_in_place(matrix: Tensor, diagonal: Tensor, damp: float, act_order: bool) -> GramFactor:
    """Write the factor over all but what is below the diagonal. diagonal: a copy of it, float32 [in]."""
    dead = diagonal <= 0
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    else:
        order = torch.arange(len(diagonal), device=matrix.device)
    live = dead.logical_not()
    mean = float(diagonal[live].mean(dtype=torch.float64)) if bool(live.any()) else 1.0
    undamped = torch.where(live, diagonal, torch.full_like(diagonal, mean))[order].double()

    def lay_out() -> None:
        reorder_upper(matrix, order)
        matrix.diagonal().copy_(undamped + damp * mean)

    for _ in range(DAMP_STEPS):
        lay_out()
        if _in_float32(matrix):
            return GramFactor(matrix, order, dead, damp)
        lay_out()
        if _in_float64(matrix):
            return GramFactor(matrix, order, dead, damp)
        damp = min(damp * 10, 1.0)
    raise ModelError(
        f"the Gram matrix of the inputs is not positive definite even with {damp:.0%} damping",
        hint="use more calibration sequences, or a calibration set closer to the model's training text",
    )


def _in_float32(matrix: Tensor) -> bool:
    """Write R over the upper triangle of `matrix` float32 [n, n]; false where that leaves some pivot too few digits, as
    in a Gram matrix whose largest eigenvalue is its whole trace, or where the matrix is not positive definite."""
    diagonal = matrix.diagonal().clone()
    if not _factor_by_halves(matrix, empty_on(matrix.device, (len(matrix), FACTORED_WHOLE))):
        return False
    kept = matrix.diagonal().square() / diagonal  # share of a column that those behind do not tell
    return bool((kept > LEAST_PIVOT).all())


def _in_float64(matrix: Tensor) -> bool:
    """The same by way of float64; false when the matrix is not positive definite."""
    factor = _factor(matrix)
    if factor is None:
        return False
    _write_upper(matrix, factor)
    return True


def _write_upper(matrix: Tensor, upper: Tensor) -> None:
    """Write an upper triangle, zeros below it, over that of `matrix`, both [n, n]."""
    matrix.tril_(-1).add_(upper.to(matrix.dtype))


def _factor(matrix: Tensor) -> Tensor | None:
    """R of the symmetric matrix R R^T that has the upper triangle of `matrix` [n, n]: float64 [n, n]; None when it is
    not positive definite."""
    backward, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1).double())  # which reads the lower one
    return None if int(failed) or not bool(torch.isfinite(backward.diagonal()).all()) else backward.flip(0, 1)


def _factor_by_halves(matrix: Tensor, inverses: Tensor) -> bool:
    """Write R over the upper triangle of `matrix` [n, n]; false when it is not positive definite.

    From the last rows to the first, nearly all by products, which run several times as fast as a factorization.
    inverses: [n, FACTORED_WHOLE] receives those of the blocks on the diagonal that are factored at once.
    """
    size = len(matrix)
    if size <= FACTORED_WHOLE:
        factor = _factor(matrix)
        if factor is None:
            return False
        identity = torch.eye(size, dtype=factor.dtype, device=factor.device)
        inverses[:, :size] = torch.linalg.solve_triangular(factor, identity, upper=True)
        _write_upper(matrix, factor)
        return True
    half = size // 2
    if not _factor_by_halves(matrix[half:, half:], inverses[half:]):
        return False
    beside = matrix[:half, half:]
    _divide(beside, matrix[half:, half:], inverses[half:])
    _take_square(matrix[:half, :half], beside)
    return _factor_by_halves(matrix[:half, :half], inverses[:half])


def _divide(left: Tensor, upper: Tensor, inverses: Tensor) -> None:
    """Bring `left` [m, n] to X with X @ upper.T = left, for an upper triangle [n, n] and the inverses of its blocks."""
    size = len(upper)
    if size <= FACTORED_WHOLE:
        left.copy_(times_transposed(left, inverses[:, :size]))
        return
    half = size // 2
    _divide(left[:, half:], upper[half:, half:], inverses[half:])
    add_times_transposed(left[:, :half], left[:, half:], upper[:half, half:], -1.0)
    _divide(left[:, :half], upper[:half, :half], inverses[:half])


def _take_square(matrix: Tensor, factor: Tensor) -> None:
    """Subtract factor @ factor.T from the upper triangle of `matrix` [n, n]."""
    half = len(matrix) // 2 if len(matrix) >= HALVED else 0
    if half:
        product = times_transposed(factor[:half], factor)
        product[:, :half].triu_()
        matrix[:half] -= product
        del product
    matrix[half:, half:] -= times_transposed(factor[half:], factor[half:]).triu_()
