"""Affine grids: where a group's scale and zero lie, and rounding to nearest on them.

Weights are taken a group of input columns at a time: `[out, in]` is seen as `[out, groups, group_size]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.tensors import Grid, GroupTensor

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
    row_chunk: int = 256,
) -> tuple[Tensor, Tensor | None]:
    """The range of each group, among shares of its full one, that loses least when its weights are rounded.

    The loss of a group with rounding error e is `e H_gg e^T`, H_gg being the group's own block of the Gram matrix
    (gram: float32 [in, in]); with the diagonal alone (gram: float32 [in]) it is `sum_j H_jj e_j^2`, which suits weights whose
    errors will be compensated across columns; with None it is `e e^T`. Returns scale and zero as `grid_for_range` does.
    Source: the clip search of AWQ (Lin et al. 2023, section 4), with the Gram block in place of stored activations.
    """
    in_features = weight.shape[1]
    size = grid.group_size or in_features
    blocks, importance = None, None
    if gram is not None and gram.dim() == 1:
        importance = gram.reshape(in_features // size, size)
    elif gram is not None:
        count = in_features // size
        blocks = gram.reshape(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
    scales, zeros = [], []
    for rows in weight.float().split(row_chunk):
        low, high = full_range(rows, grid)
        best_loss = torch.full_like(low, float("inf"))
        best_share = torch.ones_like(low)
        for share in shrinks:
            scale, zero = grid_for_range(low * share, high * share, grid, scale_dtype)
            error = grouped(nearest_values(rows, scale, zero, grid) - rows, grid)  # [rows, groups, group_size]
            if blocks is not None:
                by_group = error.transpose(0, 1)  # [groups, rows, group_size]
                loss = (torch.bmm(by_group, blocks) * by_group).sum(dim=2).T
            elif importance is not None:
                loss = (error.square_() * importance).sum(dim=2)
            else:
                loss = error.square_().sum(dim=2)
            better = loss < best_loss
            best_loss = torch.where(better, loss, best_loss)
            best_share = torch.where(better, torch.full_like(best_share, share), best_share)
        scale, zero = grid_for_range(low * best_share, high * best_share, grid, scale_dtype)
        scales.append(scale)
        zeros.append(zero)
    if grid.symmetric:
        return torch.cat(scales), None
    return torch.cat(scales), torch.cat([zero for zero in zeros if zero is not None])
