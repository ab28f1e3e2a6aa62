"""Affine grids: where a group's scale and zero lie, and rounding to nearest on them.

Weights are taken a group of input columns at a time: `[out, in]` is seen as `[out, groups, group_size]`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantkit.arena import empty_on, packed
from quantkit.maths.products import SMALL_BAND_VALUES, product_bands
from quantkit.tensors import Grid, GroupTensor

Candidates = tuple[Tensor, Tensor]
"""Scales float32 and zeros uint8 to choose from, both [candidates, out, groups]: neighbours are ranges next to each
other, and of a symmetric grid the second half are the first with the other sign."""

ROW_CHUNK = 512
"""Rows whose candidates are scored together: a band of a wide layer stays within tens of megabytes."""

SHRINKS = tuple(1.0 - 0.025 * step for step in range(17))
"""Candidate ranges of a group as shares of its full range: 1 down to 0.6. On true fp32 weights at 4 bits the best share
of nearly every group lies between 0.7 and 1."""

COARSE = 2
"""Every so many shares are tried, then those between the best one and its neighbours: 11 for 17, and 0.1 (symmetric
GPTQ) to 0.5% (AWQ to nearest) more loss in the layers of SmolLM2."""


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
    codes = empty_on(weight.device, weight.shape, torch.uint8)
    for rows in product_bands(weight, SMALL_BAND_VALUES):
        own = grouped(weight[rows].float(), grid)  # [rows, groups, group_size]
        near = torch.div(own, scale[rows].unsqueeze(2), out=empty_on(own.device, own.shape))
        near += zero_point(None if zero is None else zero[rows], grid)
        codes[rows] = near.round_().clamp_(0, grid.levels - 1).view(-1, weight.shape[1])
    return codes


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
    coarse: int = COARSE,
) -> tuple[Tensor, Tensor | None]:
    """The range of each group, among shares of its full one, that loses least when its weights are rounded.

    The loss of a group with rounding error e is `e H_gg e^T`, H_gg being the group's own block of the Gram matrix
    (gram: float32 [in, in]); with the diagonal alone (gram: float32 [in]) it is `sum_j H_jj e_j^2`, which suits
    weights whose errors will be compensated across columns; with None it is `e e^T`. shrinks: the shares, one next to
    the other. coarse: every how many of them are tried before the neighbours of the best one. Returns scale and zero as
    `grid_for_range` does, but a symmetric scale may be negative: 2**bits levels around a fixed zero are one more on one
    side, and each group has its choice. Source: the clip search of AWQ (Lin et al. 2023, section 4), with the Gram
    block in place of stored activations; llama.cpp's Q4_0 for the sign.
    """
    known = gram if gram is None or gram.dim() == 1 else _blocks(gram, grid)
    found = [
        _search_rows(weight[rows].float(), grid, known, scale_dtype, shrinks, coarse)
        for rows in product_bands(weight, SMALL_BAND_VALUES)
    ]
    if len(found) == 1:
        return found[0]
    scales, zeros = zip(*found, strict=True)
    return torch.cat(scales), None if grid.symmetric else torch.cat(zeros)


def _blocks(gram: Tensor, grid: Grid) -> Tensor:
    """The groups' own blocks of a Gram matrix [in, in]: [groups, group_size, group_size]; on a CPU folded."""
    size = grid.group_size or len(gram)
    count = len(gram) // size
    blocks = packed(gram.reshape(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1))
    if gram.device.type != "cpu":
        return blocks
    from quantkit.maths.kernels import STRIP

    return upper_bands(blocks, STRIP)


def _search_rows(
    weight: Tensor,
    grid: Grid,
    known: Tensor | None,
    scale_dtype: torch.dtype,
    shrinks: tuple[float, ...],
    coarse: int,
) -> tuple[Tensor, Tensor | None]:
    """The same for some rows of it, float32: all their candidates are held. known: of the inputs, as it is given or, of
    a Gram matrix, by `_blocks`."""
    low, high = full_range(weight, grid)
    shares = low.new_tensor(shrinks).view(-1, 1, 1)
    scale, zero = grid_for_range(low * shares, high * shares, grid, scale_dtype)
    if zero is None:  # one side has a level more than the other: a negative scale gives it to the positive side
        scale = torch.cat([scale, -scale])
        zero = torch.full(scale.shape, 2 ** (grid.bits - 1), dtype=torch.uint8, device=scale.device)
    candidates = (scale, zero)
    if known is None or known.dim() == 1:
        best = _best_by_columns(weight, grid, known, candidates, coarse)
    else:
        best_of = _best_range_by_blocks if weight.device.type == "cpu" else _best_range_by_blocks_tensors
        best = best_of(weight, grid, known, candidates, coarse)
    found = best.unsqueeze(0)
    return scale.gather(0, found).squeeze(0), None if grid.symmetric else zero.gather(0, found).squeeze(0)


def _best_by_columns(
    weight: Tensor, grid: Grid, importance: Tensor | None, candidates: Candidates, coarse: int
) -> Tensor:
    """Index of the best candidate of each group, int64 [out, groups], columns weighted by `importance` [in]."""
    in_features = weight.shape[1]
    size = grid.group_size or in_features
    if importance is None:
        importance = torch.ones(in_features, device=weight.device)
    by_group = importance.float().reshape(-1, size)
    best_of = _best_range if weight.device.type == "cpu" else _best_range_tensors
    return best_of(weight, grid, by_group, candidates, coarse)


def _best_range(weight: Tensor, grid: Grid, importance: Tensor, candidates: Candidates, coarse: int) -> Tensor:
    """The same compiled, with importance float32 [groups, group_size]."""
    from quantkit.maths.kernels import best_range

    return _compiled(best_range, len(weight), weight, importance, candidates, grid, coarse)


def _best_range_tensors(weight: Tensor, grid: Grid, importance: Tensor, candidates: Candidates, coarse: int) -> Tensor:
    """The same for any device."""
    return _least(candidates, lambda error: (error.square() * importance).sum(dim=2), weight, grid, coarse)


def _best_range_by_blocks(weight: Tensor, grid: Grid, blocks: Tensor, candidates: Candidates, coarse: int) -> Tensor:
    """Index of the best candidate of each group, int64 [out, groups], by the groups' own blocks of the Gram matrix,
    folded."""
    from quantkit.maths.kernels import bands_of, best_range_by_blocks

    return _compiled(best_range_by_blocks, bands_of(len(weight)), weight, blocks, candidates, grid, coarse)


def _best_range_by_blocks_tensors(
    weight: Tensor, grid: Grid, blocks: Tensor, candidates: Candidates, coarse: int
) -> Tensor:
    """The same for any device, by blocks as they are."""

    def loss(error: Tensor) -> Tensor:
        turned = error.transpose(0, 1)  # [groups, rows, group_size]
        return (torch.bmm(turned, blocks) * turned).sum(dim=2).T

    return _least(candidates, loss, weight, grid, coarse)


def upper_bands(blocks: Tensor, width: int) -> Tensor:
    """Symmetric matrices [n, size, size] folded over bands of `width` columns: what lies left of a row's own band is 0,
    what lies right of it doubled. `e M e^T` stays the same, and half of M need not be multiplied."""
    band = torch.arange(blocks.shape[1], device=blocks.device) // width
    return blocks * (1.0 + (band[None, :] - band[:, None]).sign())


def _compiled(
    kernel: Callable[..., None],
    steps: int,
    weight: Tensor,
    statistic: Tensor,
    candidates: Candidates,
    grid: Grid,
    coarse: int,
) -> Tensor:
    """The index by a loop of so many steps in maths/kernels.py; statistic: float32, one entry for each group."""
    scale, zero = candidates
    best = torch.zeros(scale.shape[1:], dtype=torch.int64)
    kernel(
        steps,
        grouped(weight, grid).contiguous().numpy(),
        statistic.contiguous().numpy(),
        scale.numpy(),
        zero.numpy(),
        grid.levels,
        shares_of(candidates, grid),
        coarse,
        best.numpy(),
    )
    return best


def shares_of(candidates: Candidates, grid: Grid) -> int:
    """How many candidates are neighbours of each other."""
    return len(candidates[0]) // (2 if grid.symmetric else 1)


def _least(candidates: Candidates, loss: Callable[[Tensor], Tensor], weight: Tensor, grid: Grid, coarse: int) -> Tensor:
    """Index of the candidate with the least loss, int64 [out, groups]; a band of rows at a time, so that copies stay
    small."""
    bands = zip(weight.split(ROW_CHUNK), *(tensor.split(ROW_CHUNK, dim=1) for tensor in candidates), strict=True)
    return torch.cat([_least_of_rows(rows, (scale, zero), loss, grid, coarse) for rows, scale, zero in bands])


def _least_of_rows(
    weight: Tensor, candidates: Candidates, loss: Callable[[Tensor], Tensor], grid: Grid, coarse: int
) -> Tensor:
    """The same of a few rows."""

    def lost(at: Tensor) -> Tensor:
        """at: int64 [out, groups], a candidate for each group."""
        scale, zero = (tensor.gather(0, at.unsqueeze(0)).squeeze(0) for tensor in candidates)
        return loss(grouped(nearest_values(weight, scale, zero, grid) - weight, grid))

    shares, count = shares_of(candidates, grid), len(candidates[0])
    anywhere = torch.zeros(candidates[0].shape[1:], dtype=torch.int64, device=weight.device)
    tried = torch.stack([anywhere + at for at in range(count) if at % shares % coarse == 0])
    least, best = torch.stack([lost(at) for at in tried]).min(dim=0)
    best = tried.gather(0, best.unsqueeze(0)).squeeze(0)
    around, lowest = best, best // shares * shares
    for step in range(1, coarse):
        for neighbour in (around - step, around + step):
            at = neighbour.clamp(min=lowest, max=lowest + shares - 1)
            found = lost(at)
            best, least = torch.where(found < least, at, best), torch.minimum(found, least)
    return best
