"""AWQ's scales: multiply the input channels that matter most before rounding, divide them out where they are made.

Source: Lin et al. 2023 (AWQ), section 3.2. There candidates are powers of the inputs' mean magnitude;
`balanced_scale` (balance.py) is another base for them. The paper scores a candidate by running the layer on stored
activations; `||(Q(W s) / s - W) X||^2 = trace(dW H dW^T)` gives the same number from the Gram matrix H = X^T X alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quantkit.maths.affine import full_range, grid_for_range, nearest_values
from quantkit.maths.products import times_transposed
from quantkit.tensors import Grid

SAMPLE_VALUES = 64 * 576
"""Weights that a candidate is scored on, in whole rows: the best exponent is a property of the inputs, which all rows
share, and the longer a row the more it tells."""

SAMPLE_ROWS = 32
"""At least so many rows, however long."""


def sample_rows(columns: int) -> int:
    """How many rows of so many columns are tried."""
    return max(SAMPLE_ROWS, SAMPLE_VALUES // columns)


def candidate_scale(base: Tensor, exponent: float) -> Tensor:
    """The scale of each input channel for one exponent: float32 [in], centred so that max * min = 1."""
    scale = base.clamp(min=1e-4).pow(exponent)
    return scale / (scale.max() * scale.min()).sqrt()


def search_scale(
    weight: Tensor, base: Tensor, gram: Tensor, grid: Grid, exponents: Sequence[float]
) -> tuple[Tensor, float]:
    """The best scale among `base ** e` for e in ascending `exponents`, and its e: float32 [in] and a number.

    weight: float32 [out, in], the linears of one input stacked by rows. base: float32 [in]. gram: float32 [in, in].
    e = 0 is a scale of one everywhere: no fold. Candidates are scored on rows taken at even distances.
    """
    weight = weight[:: -(-len(weight) // sample_rows(weight.shape[1]))]

    def losses(steps: list[int]) -> list[float]:
        scale = torch.stack([candidate_scale(base, exponents[step]) for step in steps]).unsqueeze(1)
        scaled = (weight * scale).flatten(0, 1)  # [candidates * rows, in]
        rounded = nearest_values(scaled, *grid_for_range(*full_range(scaled, grid), grid), grid)
        error = rounded.view(len(steps), *weight.shape).div_(scale).sub_(weight).flatten(0, 1)
        lost = times_transposed(error, gram.T).mul_(error)
        return lost.view(len(steps), -1).sum(dim=1, dtype=torch.float64).tolist()  # type: ignore[no-any-return]

    best = exponents[_coarse_to_fine(losses, len(exponents))]
    return candidate_scale(base, best), best


def _coarse_to_fine(losses_of: Callable[[list[int]], list[float]], count: int) -> int:
    """The integer below `count` with the least loss, looked for in halving steps around the best so far.

    The loss is smooth in the exponent but for rounding, so that half the candidates need not be tried. losses_of: of
    several at once, so that the Gram matrix is read once for them.
    """
    step = max(1, count // 4)
    tried = list(range(0, count, step))
    losses = dict(zip(tried, losses_of(tried), strict=True))
    while step > 1:
        step = (step + 1) // 2
        best = min(losses, key=lambda position: (losses[position], position))
        tried = [at for at in (best - step, best + step) if 0 <= at < count and at not in losses]
        if tried:
            losses |= zip(tried, losses_of(tried), strict=True)
    return min(losses, key=lambda position: (losses[position], position))


def tie_over_heads(values: Tensor, head_dim: int, repeats: int, reduce: str) -> Tensor:
    """Bring a per-channel statistic of o_proj's inputs [heads * head_dim] to the value channels [kv_heads * head_dim].

    Query heads h * repeats ... h * repeats + repeats - 1 share the value head h. reduce: "mean", or "first" for
    values that are equal already.
    """
    view = values.reshape(-1, repeats, head_dim)  # [kv_heads, repeats, head_dim]
    return (view.mean(dim=1) if reduce == "mean" else view[:, 0]).reshape(-1)


def mean_over_heads(values: Tensor, head_dim: int, repeats: int) -> Tensor:
    """Give channels of o_proj's inputs that share a value channel their mean: [heads * head_dim]."""
    return spread_over_heads(tie_over_heads(values, head_dim, repeats, "mean"), head_dim, repeats)


def spread_over_heads(values: Tensor, head_dim: int, repeats: int) -> Tensor:
    """The inverse of `tie_over_heads`: [kv_heads * head_dim] to [heads * head_dim]."""
    return values.reshape(-1, 1, head_dim).expand(-1, repeats, head_dim).reshape(-1)
