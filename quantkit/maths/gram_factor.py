"""The factor of a Gram matrix, by which errors of rounded columns are passed on to those that are not rounded.

H = R R^T with R upper triangular, so that columns are taken in their order. The loss of an error D of the weight is
then `|D R|^2`, and element k of `D R` knows no column behind k: rounding can go from the first column to the last and
bring each element as near to 0 as its grid allows. That is GPTQ, whose own description takes a factor of the inverse of
H (`maths/compensate.py`); that the two are the same is shown by Chen et al. 2025, The Geometry of LLM Quantization:
GPTQ as Babai's Nearest Plane Algorithm. Nothing is inverted here but small blocks on the diagonal; the inverse was half
of the work.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.maths.order import reordered
from quantkit.maths.products import times_transposed

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

    upper: float32 [in, in], upper triangular R with R R^T = H + damping, rows and columns in `order`.
    order: int64 [in], the column rounded at each step. dead: bool [in], columns that never had an input; they are
    rounded to nearest, since nothing is known of them and other columns cannot make up for them.
    damp: the share of the mean diagonal that was added; larger than asked when the factorization failed with less.
    """

    upper: Tensor
    order: Tensor
    dead: Tensor
    damp: float


def factor_gram(gram: Tensor, damp: float, act_order: bool) -> GramFactor:
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
            return GramFactor(upper, order, dead, damp)
        damp = min(damp * 10, 1.0)
    raise ModelError(
        f"the Gram matrix of the inputs is not positive definite even with {damp:.0%} damping",
        hint="use more calibration sequences, or a calibration set closer to the model's training text",
    )


def _in_float32(matrix: Tensor) -> Tensor | None:
    """R of a symmetric matrix float32 [n, n], which it takes the place of; None where that leaves some pivot too few
    digits, as in a Gram matrix whose largest eigenvalue is its whole trace, or where the matrix is not positive
    definite."""
    diagonal = matrix.diagonal().clone()
    if not _factor_by_halves(matrix, matrix.new_empty(len(matrix), FACTORED_WHOLE)):
        return None
    kept = matrix.diagonal().square() / diagonal  # share of a column that those behind do not tell
    return matrix if bool((kept > LEAST_PIVOT).all()) else None


def _in_float64(matrix: Tensor) -> Tensor | None:
    """R of a symmetric matrix [n, n] by way of float64, float32 [n, n]; None when it is not positive definite."""
    factor = _factor(matrix)
    return None if factor is None else factor.float()


def _factor(matrix: Tensor) -> Tensor | None:
    """R of a symmetric matrix R R^T, float64 [n, n]; None when it is not positive definite."""
    backward, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1).double())
    return None if int(failed) or not bool(torch.isfinite(backward.diagonal()).all()) else backward.flip(0, 1)


def _factor_by_halves(matrix: Tensor, inverses: Tensor) -> bool:
    """Write R over `matrix` [n, n], of which the upper triangle is read; false when it is not positive definite.

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
        matrix.copy_(factor)
        return True
    half = size // 2
    if not _factor_by_halves(matrix[half:, half:], inverses[half:]):
        return False
    beside = matrix[:half, half:]
    _divide(beside, matrix[half:, half:], inverses[half:])
    _take_square(matrix[:half, :half], beside)
    matrix[half:, :half] = 0
    return _factor_by_halves(matrix[:half, :half], inverses[:half])


def _divide(left: Tensor, upper: Tensor, inverses: Tensor) -> None:
    """Bring `left` [m, n] to X with X @ upper.T = left, for an upper triangle [n, n] and the inverses of its blocks."""
    size = len(upper)
    if size <= FACTORED_WHOLE:
        left.copy_(times_transposed(left, inverses[:, :size]))
        return
    half = size // 2
    _divide(left[:, half:], upper[half:, half:], inverses[half:])
    left[:, :half] -= times_transposed(left[:, half:], upper[:half, half:])
    _divide(left[:, :half], upper[:half, :half], inverses[:half])


def _take_square(matrix: Tensor, factor: Tensor) -> None:
    """Subtract factor @ factor.T from the upper triangle of `matrix` [n, n]."""
    half = len(matrix) // 2 if len(matrix) >= HALVED else 0
    if half:
        matrix[:half] -= times_transposed(factor[:half], factor)
    matrix[half:, half:] -= times_transposed(factor[half:], factor[half:])
