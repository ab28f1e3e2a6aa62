"""What error compensation leaves on the table: codes and scales improved in turn, the loss falling at every step.

GPTQ decides each column once and never looks back. Coordinate descent visits every code again, the others held, and
moves it to the grid point that is best given them; a refit solves for the scales that suit the codes best. Both work
on the same loss, `trace((Q - W) H (Q - W)^T)`. Source: Behdin et al. 2023 (QuantEase), section 3, for the descent.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quantkit.maths.affine import as_stored
from quantkit.tensors import Grid

BLOCK_COLUMNS = 128
ROW_CHUNK = 256


def damped(gram: Tensor, damp: float) -> Tensor:
    """H with `damp` times its mean diagonal added; dead columns get the mean so that they stay at their nearest
    code."""
    diagonal = gram.diagonal()
    live = diagonal > 0
    mean = diagonal[live].mean() if bool(live.any()) else diagonal.new_ones(())
    result = gram.clone()
    result.diagonal().copy_(torch.where(live, diagonal, mean) + damp * mean)
    return result


def refine(
    weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid, gram: Tensor, rounds: int
) -> tuple[Tensor, Tensor]:
    """Better codes uint8 [out, in] and scales float32 [out, groups] for a rounded weight float32 [out, in].

    gram: float32 [in, in], already damped. Each round is a sweep of coordinate descent and a refit of the scales, and
    one last sweep follows. Zeros stay as they are.
    """
    middle = torch.full_like(scale, float(2 ** (grid.bits - 1))) if zero is None else zero.float()
    for _ in range(rounds):
        codes = descend(weight, codes, scale, middle, grid, gram)
        scale = refit_scale(weight, codes, scale, middle, grid, gram)
    return descend(weight, codes, scale, middle, grid, gram), scale


def descend(weight: Tensor, codes: Tensor, scale: Tensor, middle: Tensor, grid: Grid, gram: Tensor) -> Tensor:
    """One sweep of coordinate descent over all columns; the loss does not rise. Codes uint8 [out, in]."""
    columns = weight.shape[1]
    size = grid.group_size or columns
    codes = codes.clone()
    of = torch.arange(columns, device=weight.device) // size
    wide_scale, wide_middle = scale[:, of], middle[:, of]  # [out, in]
    gradient = ((codes.float() - wide_middle) * wide_scale - weight) @ gram
    for start in range(0, columns, BLOCK_COLUMNS):
        part = slice(start, min(start + BLOCK_COLUMNS, columns))
        inner = gram[part, part].contiguous()
        codes[:, part], change = _descend_block(
            codes[:, part].contiguous(),
            wide_scale[:, part].contiguous(),
            wide_middle[:, part].contiguous(),
            gradient[:, part].contiguous(),
            inner,
            grid.levels,
        )
        if part.stop < columns:
            gradient[:, part.stop :].addmm_(change, gram[part, part.stop :])
    return codes


def _descend_block(
    codes: Tensor, scale: Tensor, middle: Tensor, gradient: Tensor, gram: Tensor, levels: int
) -> tuple[Tensor, Tensor]:
    """New codes and the change of the values, both [out, columns], of one block of columns."""
    if codes.device.type == "cpu":
        from quantkit.maths.kernels import descend_block

        change = np.empty(gradient.shape, dtype=np.float32)
        moved = codes.numpy().copy()
        descend_block(moved, scale.numpy(), middle.numpy(), gradient.numpy().copy(), gram.numpy(), levels, change)
        return torch.from_numpy(moved), torch.from_numpy(change)
    return _descend_block_tensors(codes, scale, middle, gradient, gram, levels)


def _descend_block_tensors(
    codes: Tensor, scale: Tensor, middle: Tensor, gradient: Tensor, gram: Tensor, levels: int
) -> tuple[Tensor, Tensor]:
    """The same for any device, a few tensor operations a column."""
    codes, gradient = codes.clone(), gradient.clone()
    change = torch.zeros_like(gradient)
    for j in range(gradient.shape[1]):
        old = codes[:, j].float()
        wanted = (old - middle[:, j]) * scale[:, j] - gradient[:, j] / gram[j, j]
        code = torch.round(wanted / scale[:, j] + middle[:, j]).clamp_(0, levels - 1)
        change[:, j] = (code - old) * scale[:, j]
        codes[:, j] = code.to(torch.uint8)
        gradient.addr_(change[:, j], gram[j])
    return codes, change


def refit_scale(weight: Tensor, codes: Tensor, scale: Tensor, middle: Tensor, grid: Grid, gram: Tensor) -> Tensor:
    """The scales that minimize the loss for given codes, as float16 stores them: float32 [out, groups].

    For each row a linear system of as many unknowns as groups: with c_g the row's codes of group g, `A_gk = c_g H_gk
    c_k` and `b_g = w H c_g`. A scale that would leave half to twice its old value stays; so does one whose group is
    all zero.
    """
    columns = weight.shape[1]
    size = grid.group_size or columns
    groups = columns // size
    fitted = torch.empty_like(scale)
    for start in range(0, weight.shape[0], ROW_CHUNK):
        rows = slice(start, start + ROW_CHUNK)
        old = scale[rows]
        count = old.shape[0]
        steps = codes[rows].float().view(count, groups, size) - middle[rows].unsqueeze(2)  # [rows, groups, group_size]
        right = ((weight[rows] @ gram).view(count, groups, size) * steps).sum(dim=2)  # [rows, groups]
        left = torch.empty(count, groups, groups, device=weight.device)
        for group in range(groups):
            band = steps[:, group] @ gram[group * size : (group + 1) * size]  # [rows, in]
            left[:, group] = (band.view(count, groups, size) * steps).sum(dim=2)
        # a little of the old scale keeps a row whose groups barely matter from running away
        ridge = left.diagonal(dim1=1, dim2=2) * 1e-4 + 1e-12
        left = left + torch.diag_embed(ridge)
        solved, failed = torch.linalg.solve_ex(left.double(), (right + ridge * old).double().unsqueeze(2))
        new = solved.squeeze(2).float()
        keep = (new > 0.5 * old) & (new < 2.0 * old) & (failed == 0).unsqueeze(1)
        fitted[rows] = torch.where(keep, as_stored(new.clamp(min=0)), old)
    return fitted
