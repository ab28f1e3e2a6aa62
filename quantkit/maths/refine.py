"""What error compensation leaves on the table: codes and scales improved in turn, the loss falling at every step.

GPTQ decides each column once and never looks back. Coordinate descent visits every code again, the others held, and
moves it to the grid point that is best given them; after the codes of a group its scale moves to the value that suits
them best. Both work on the same loss, `trace((Q - W) H (Q - W)^T)`. Source: Behdin et al. 2023 (QuantEase), section 3,
for the descent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from quantkit.arena import empty_on, packed
from quantkit.maths.affine import as_stored
from quantkit.maths.pairs import move_pairs
from quantkit.maths.products import product_bands, times_transposed
from quantkit.tensors import Grid

BLOCK_COLUMNS = 128
"""Columns, at least a group, whose gradient is kept up to date code by code; the others' comes from one product."""


@contextmanager
def damped(gram: Tensor, damp: float) -> Iterator[Tensor]:
    """H with `damp` times its mean diagonal added while this lasts, in its own place; dead columns get the mean so that
    they stay at their nearest code."""
    diagonal = gram.diagonal().clone()
    live = diagonal > 0
    mean = diagonal[live].mean() if bool(live.any()) else diagonal.new_ones(())
    gram.diagonal().copy_(torch.where(live, diagonal, mean) + damp * mean)
    try:
        yield gram
    finally:
        gram.diagonal().copy_(diagonal)


def refine(
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    grid: Grid,
    gram: Tensor,
    sweeps: int,
    pairs: int = 0,
) -> tuple[Tensor, Tensor]:
    """Better codes uint8 [out, in] and scales float32 [out, groups] for a rounded weight float32 [out, in].

    gram: float32 [in, in], already damped. Each sweep visits every code and every scale once; scales stay exact in
    float16, zeros stay as they are. pairs: how often codes are then moved two at a time, with a sweep behind it.
    """
    middle = torch.full_like(scale, float(2 ** (grid.bits - 1))) if zero is None else zero.float()
    codes, scale = empty_on(codes.device, codes.shape, codes.dtype).copy_(codes), scale.clone()
    for rows in product_bands(weight):
        _refine_rows(weight[rows], codes[rows], scale[rows], middle[rows], grid, gram, sweeps, pairs)
    return codes, scale


def _refine_rows(
    weight: Tensor, codes: Tensor, scale: Tensor, middle: Tensor, grid: Grid, gram: Tensor, sweeps: int, pairs: int
) -> None:
    """Some rows of the same, codes and scale in their places. middle: float32 [out, groups], what stands for 0."""
    columns = weight.shape[1]
    size = grid.group_size or columns
    groups = columns // size
    steps = empty_on(codes.device, (len(codes), groups, size)).copy_(codes.view(-1, groups, size))
    steps -= middle.unsqueeze(2)
    error = steps.mul_(scale.unsqueeze(2)).view_as(weight).sub_(weight)
    width = max(1, BLOCK_COLUMNS // size) * size
    for sweep in range(sweeps + pairs):
        if sweep >= sweeps:
            move_pairs(codes, scale, error, gram, grid.levels)
        for start in range(0, columns, width):
            part = slice(start, min(start + width, columns))
            of = slice(part.start // size, part.stop // size)
            gradient = times_transposed(error, gram[:, part].T)  # its own mirror, so read by columns
            inner = packed(gram[part, part])
            part_codes, part_scale, part_error = packed(codes[:, part]), packed(scale[:, of]), packed(error[:, part])
            _descend_block(part_codes, part_scale, middle[:, of].contiguous(), gradient, inner, grid.levels, part_error)
            codes[:, part], scale[:, of], error[:, part] = part_codes, part_scale, part_error


def _descend_block(
    codes: Tensor, scale: Tensor, middle: Tensor, gradient: Tensor, gram: Tensor, levels: int, error: Tensor
) -> None:
    """One sweep over a block of whole groups; codes, scale and error are updated, gradient is used up."""
    if codes.device.type == "cpu":
        from quantkit.maths.kernels import bands_of, descend_block

        given = [tensor.numpy() for tensor in (codes, scale, middle, gradient, gram)]
        descend_block(bands_of(len(codes)), *given, levels, error.numpy())
        return
    _descend_block_tensors(codes, scale, middle, gradient, gram, levels, error)


def _descend_block_tensors(
    codes: Tensor, scale: Tensor, middle: Tensor, gradient: Tensor, gram: Tensor, levels: int, error: Tensor
) -> None:
    """The same for any device, a few tensor operations a column."""
    groups = scale.shape[1]
    size = codes.shape[1] // groups
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        step = scale[:, group].clone()
        for j in range(part.start, part.stop):
            old = codes[:, j].float()
            code = torch.round(old - gradient[:, j] / (gram[j, j] * step)).clamp_(0, levels - 1)
            moved = (code - old) * step
            codes[:, j] = code.to(torch.uint8)
            error[:, j] += moved
            gradient.addr_(moved, gram[j])
        level = codes[:, part].float() - middle[:, group : group + 1]  # [out, group_size]
        slope = (level * gradient[:, part]).sum(dim=1)
        curve = ((level @ gram[part, part]) * level).sum(dim=1)
        wanted = step - slope / curve.clamp(min=torch.finfo(torch.float32).tiny)
        ratio = wanted / step
        moved = as_stored(wanted.abs()) * step.sign() - step
        better = (curve > 0) & (ratio > 0.5) & (ratio < 2.0) & (moved * (2 * slope + moved * curve) < 0)
        moved = torch.where(better, moved, torch.zeros_like(moved))
        scale[:, group] = step + moved
        change = moved.unsqueeze(1) * level
        error[:, part] += change
        gradient += change @ gram[part]
