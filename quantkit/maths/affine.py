"""Affine grids: where a group's scale and zero lie, and rounding to nearest on them.

Weights are taken a group of input columns at a time: `[out, in]` is seen as `[out, groups, group_size]`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantkit.tensors import Grid, GroupTensor

Candidate = tuple[Tensor, Tensor | None]
"""Scale and zero of every group, as `grid_for_range` gives them."""

ROW_CHUNK = 512
"""Rows whose candidates are scored together: a band of a wide layer stays within tens of megabytes."""

SHRINKS = tuple(1.0 - 0.025 * step for step in range(17))
"""Candidate ranges of a group as shares of its full range: 1 down to 0.6. On true fp32 weights at 4 bits the best share
of nearly every group lies between 0.7 and 1."""


def grouped(weight: Tensor, grid: Grid) -> Tensor:
    """A view [out, groups, group_size] of a weight [out, in] whose columns the group size divides."""
    out_features, in_features = weight.shape
    size = grid.group_size or in_features
    assert in_features % size == 0, "misfits are refused before any weight is read"
    return weight.reshape(out_features, in_features // size, size)


def as_stored(scale: Tensor, scale_dtype: torch.dtype = torch.float16) -> Tensor:
    """The scale as its storage dtype will give it back, kept positive and finite: float32."""
    if scale_dtype == torch.float32:
        return scale.clamp(min=torch.finfo(torch.float32).tiny)
    info = torch.finfo(scale_dtype)
    smallest = info.tiny * info.eps  # the smallest subnormal
    return scale.clamp(min=smallest, max=info.max).to(scale_dtype).float()


def full_range(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each group with 0 always inside: two float32 [out, groups].

    A symmetric group's range is that of its largest magnitude.
    """
    groups = grouped(weight.float(), grid)
    low = groups.amin(dim=2).clamp(max=0.0)
    high = groups.amax(dim=2).clamp(min=0.0)
    if grid.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    return low, high


def grid_for_range(
    low: Tensor, high: Tensor, grid: Grid, scale_dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor | None]:
    """Scale float32 [out, groups] and zero uint8 [out, groups] (None when symmetric) that span a range.

    A group that is all zero gets scale 1, so that its codes equal its zero. Source: Frantar et al. 2022, section 3,
    "Quantizer" of the GPTQ reference implementation (scale = range / (levels - 1), zero = round(-low / scale)).
    """
    span = high - low
    scale = torch.where(span > 0, span / (grid.levels - 1), torch.ones_like(span))
    scale = as_stored(scale, scale_dtype)
    if grid.symmetric:
        return scale, None
    zero = torch.round(-low / scale).clamp_(0, grid.levels - 1).to(torch.uint8)
    return scale, zero


def zero_point(zero: Tensor | None, grid: Grid) -> Tensor | float:
    """The zero as a number to compute with: [out, groups, 1] or the fixed middle of a symmetric grid."""
    return float(2 ** (grid.bits - 1)) if zero is None else zero.float().unsqueeze(2)


def nearest_codes(weight: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    """Codes of the nearest grid points: uint8 [out, in]."""
    groups = grouped(weight.float(), grid)  # [out, groups, group_size]
    codes = torch.round(groups / scale.unsqueeze(2) + zero_point(zero, grid))
    return codes.clamp_(0, grid.levels - 1).to(torch.uint8).reshape(weight.shape)


def nearest_values(weight: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    """The nearest grid points themselves: float32 [out, in]."""
    groups = grouped(weight.float(), grid)
    middle = zero_point(zero, grid)
    codes = torch.round(groups / scale.unsqueeze(2) + middle).clamp_(0, grid.levels - 1)
    return ((codes - middle) * scale.unsqueeze(2)).reshape(weight.shape)


def quantize_nearest(weight: Tensor, grid: Grid, scale_dtype: torch.dtype = torch.float16) -> GroupTensor:
    """Round a weight [out, in] to nearest on its full range: the plain method that others have to beat."""
    scale, zero = grid_for_range(*full_range(weight, grid), grid, scale_dtype)
    return GroupTensor(nearest_codes(weight, scale, zero, grid), scale, zero, grid)


def search_grid(
    weight: Tensor,
    grid: Grid,
    gram: Tensor | None,
    scale_dtype: torch.dtype = torch.float16,
    shrinks: tuple[float, ...] = SHRINKS,
) -> tuple[Tensor, Tensor | None]:
    """The range of each group, among shares of its full one, that loses least when its weights are rounded.

    The loss of a group with rounding error e is `e H_gg e^T`, H_gg being the group's own block of the Gram matrix
    (gram: float32 [in, in]); with the diagonal alone (gram: float32 [in]) it is `sum_j H_jj e_j^2`, which suits
    weights whose errors will be compensated across columns; with None it is `e e^T`. Returns scale and zero as
    `grid_for_range` does, but a symmetric scale may be negative: 2**bits levels around a fixed zero are one more on one
    side, and each group has its choice. Source: the clip search of AWQ (Lin et al. 2023, section 4), with the Gram
    block in place of stored activations; llama.cpp's Q4_0 for the sign.
    """
    weight = weight.float()
    low, high = full_range(weight, grid)
    candidates = [grid_for_range(low * share, high * share, grid, scale_dtype) for share in shrinks]
    if grid.symmetric:  # one side has a level more than the other: a negative scale gives it to the positive side
        candidates += [(-scale, None) for scale, _ in candidates]
    if gram is None or gram.dim() == 1:
        best = _best_by_columns(weight, grid, gram, candidates)
    else:
        best = _best_by_blocks(weight, grid, gram, candidates)
    scale = torch.stack([scale for scale, _ in candidates]).gather(0, best.unsqueeze(0)).squeeze(0)
    if grid.symmetric:
        return scale, None
    zeros = torch.stack([zero for _, zero in candidates if zero is not None])
    return scale, zeros.gather(0, best.unsqueeze(0)).squeeze(0)


def _best_by_columns(weight: Tensor, grid: Grid, importance: Tensor | None, candidates: list[Candidate]) -> Tensor:
    """Index of the best candidate of each group, int64 [out, groups], columns weighted by `importance` [in]."""
    in_features = weight.shape[1]
    size = grid.group_size or in_features
    if importance is None:
        importance = torch.ones(in_features, device=weight.device)
    by_group = importance.float().reshape(-1, size)
    best_of = _best_range if weight.device.type == "cpu" else _best_range_tensors
    return best_of(weight, grid, by_group, candidates)


def _best_range(weight: Tensor, grid: Grid, importance: Tensor, candidates: list[Candidate]) -> Tensor:
    """The same compiled, with importance float32 [groups, group_size]."""
    from quantkit.maths.kernels import best_range

    return _compiled(best_range, weight, importance, candidates, grid)


def _best_range_tensors(weight: Tensor, grid: Grid, importance: Tensor, candidates: list[Candidate]) -> Tensor:
    """The same for any device."""
    return _least(candidates, lambda error: (error.square() * importance).sum(dim=2), weight, grid)


def _best_by_blocks(weight: Tensor, grid: Grid, gram: Tensor, candidates: list[Candidate]) -> Tensor:
    """Index of the best candidate of each group, int64 [out, groups], by the groups' own blocks of the Gram matrix."""
    size = grid.group_size or weight.shape[1]
    count = weight.shape[1] // size
    blocks = gram.reshape(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
    best_of = _best_range_by_blocks if weight.device.type == "cpu" else _best_range_by_blocks_tensors
    return best_of(weight, grid, blocks, candidates)


def _best_range_by_blocks(weight: Tensor, grid: Grid, blocks: Tensor, candidates: list[Candidate]) -> Tensor:
    """The same compiled, with blocks float32 [groups, group_size, group_size]."""
    from quantkit.maths.kernels import STRIP, best_range_by_blocks

    return _compiled(best_range_by_blocks, weight, upper_bands(blocks, STRIP), candidates, grid)


def _best_range_by_blocks_tensors(weight: Tensor, grid: Grid, blocks: Tensor, candidates: list[Candidate]) -> Tensor:
    """The same for any device."""

    def loss(error: Tensor) -> Tensor:
        turned = error.transpose(0, 1)  # [groups, rows, group_size]
        return (torch.bmm(turned, blocks) * turned).sum(dim=2).T

    return _least(candidates, loss, weight, grid)


def upper_bands(blocks: Tensor, width: int) -> Tensor:
    """Symmetric matrices [n, size, size] folded over bands of `width` columns: what lies left of a row's own band is 0,
    what lies right of it doubled. `e M e^T` stays the same, and half of M need not be multiplied."""
    band = torch.arange(blocks.shape[1], device=blocks.device) // width
    return blocks * (1.0 + (band[None, :] - band[:, None]).sign())


def _compiled(
    kernel: Callable[..., None], weight: Tensor, statistic: Tensor, candidates: list[Candidate], grid: Grid
) -> Tensor:
    """The index by a loop of maths/kernels.py; statistic: float32, one entry for each group."""
    scale = torch.stack([scale for scale, _ in candidates])
    middle = torch.full_like(scale, float(2 ** (grid.bits - 1)))
    if not grid.symmetric:
        middle = torch.stack([zero for _, zero in candidates if zero is not None]).float()
    best = torch.zeros(scale.shape[1:], dtype=torch.int64)
    kernel(
        grouped(weight, grid).contiguous().numpy(),
        statistic.contiguous().numpy(),
        scale.numpy(),
        middle.numpy(),
        grid.levels,
        best.numpy(),
    )
    return best


def _least(candidates: list[Candidate], loss: Callable[[Tensor], Tensor], weight: Tensor, grid: Grid) -> Tensor:
    """Index of the candidate with the least loss [rows, groups]; a band of rows at a time, so that copies stay
    small."""
    chosen = []
    for start in range(0, weight.shape[0], ROW_CHUNK):
        rows = slice(start, start + ROW_CHUNK)
        losses = []
        for scale, zero in candidates:
            values = nearest_values(weight[rows], scale[rows], None if zero is None else zero[rows], grid)
            losses.append(loss(grouped(values - weight[rows], grid)))
        chosen.append(torch.stack(losses).argmin(dim=0))
    return torch.cat(chosen)
