"""GPTQ on the grids of ggml's blocks: the encoder's scales, codes by error compensation, then both improved in turn.

A plain GGUF file holds the result: nothing but the choice of numbers differs from llama.cpp's. The compiled loops run
on the CPU, wherever the weight lies.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from quantkit.arena import empty, empty_on, packed
from quantkit.maths.compensate import compensated
from quantkit.maths.ggml_codes import LAYOUTS, CodedBlocks, Layout
from quantkit.maths.ggml_descend import bands_of, descend_block, round_block
from quantkit.maths.gram_factor import GramFactor
from quantkit.maths.order import reordered
from quantkit.maths.products import product_bands, times_transposed
from quantkit.maths.refine import BLOCK_COLUMNS
from quantkit.tensors import row_bands


def values_of(coded: CodedBlocks, type_name: str) -> Tensor:
    """The weight that taken blocks stand for: float32 [rows, columns]."""
    layout, codes = LAYOUTS[type_name], coded.codes
    table, found = layout.table(codes.device), empty_on(codes.device, codes.shape)
    for rows in row_bands(codes):
        values = table[codes[rows].long()].unflatten(1, (-1, layout.group))
        found[rows] = values.mul_(coded.step[rows].unsqueeze(2)).sub_(coded.base[rows].unsqueeze(2)).flatten(1)
    return found


def compensate_codes(weight: Tensor, coded: CodedBlocks, type_name: str, factor: GramFactor) -> CodedBlocks:
    """The same blocks with the codes of a weight float32 [rows, columns] rounded with error compensation.

    Scales and minima stay. Where a group's step is 0 its codes stay too, and what they miss is passed on.
    """
    layout = LAYOUTS[type_name]
    table = layout.table(torch.device("cpu")).numpy()
    still, base = coded.step == 0, coded.base
    # so small that what is added to the minimum is lost in rounding, whatever the code
    step = torch.where(still, torch.full_like(coded.step, torch.finfo(torch.float32).tiny), coded.step)
    own_step = np.ascontiguousarray(step.cpu().numpy())

    def rounded(rows: slice, weight: Tensor, owed: Tensor, at: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        group = at // layout.group
        # on weights moved by the minimum the grid is a multiple of the step, and the errors are the same
        device, weight = weight.device, reordered(base[rows], group).add_(weight).cpu()
        codes, errors = empty(weight.shape, torch.uint8), empty(weight.shape)
        round_block(
            bands_of(weight),
            weight.numpy(),
            owed.cpu().numpy(),
            own_step[rows],
            table,
            not layout.values,
            group.cpu().numpy(),
            upper.cpu().numpy(),
            codes.numpy(),
            errors.numpy(),
        )
        return codes.to(device), errors.to(device)

    codes = compensated(weight, factor, rounded)
    return replace(coded, codes=torch.where(still.repeat_interleave(layout.group, dim=1), coded.codes, codes))


def refine_blocks(weight: Tensor, coded: CodedBlocks, type_name: str, gram: Tensor, sweeps: int) -> CodedBlocks:
    """Better codes, scales and minima for rounded blocks of a weight float32 [rows, columns].

    gram: float32 [columns, columns], already damped. Each sweep visits every code, scale and minimum once. Scales and
    minima stay numbers that the type can store; the float16 numbers of super-blocks stay as they are.
    """
    layout = LAYOUTS[type_name]
    device = weight.device
    codes, step, base = coded.codes.cpu().clone(), coded.step.cpu(), coded.base.cpu()
    units = torch.stack((coded.unit, coded.minimum_unit)).cpu()
    for rows in product_bands(weight):
        error = values_of(coded.of_rows(rows), type_name).sub_(weight[rows])
        _refine_rows(error, codes[rows], step[rows], base[rows], units[:, rows], layout, gram, sweeps)
    return _stored(coded, layout, codes.to(device), step.to(device), base.to(device))


def _refine_rows(
    error: Tensor, codes: Tensor, step: Tensor, base: Tensor, units: Tensor, layout: Layout, gram: Tensor, sweeps: int
) -> None:
    """Some rows of the same, codes, steps and minima in their places, all on the CPU but the error and the Gram matrix.

    error: float32 [rows, columns], what the codes stand for less the weight; used up. units: float32 [2, rows, groups],
    of steps and minima.
    """
    table, levels = layout.table(torch.device("cpu")).numpy(), np.array(layout.levels or (0, 0), dtype=np.int64)
    columns = error.shape[1]
    for _ in range(sweeps):
        for start in range(0, columns, BLOCK_COLUMNS):
            part = slice(start, min(start + BLOCK_COLUMNS, columns))
            of = slice(part.start // layout.group, part.stop // layout.group)
            gradient = times_transposed(error, gram[:, part].T).cpu()
            inner = packed(gram[part, part]).cpu()
            own_codes, own_step, own_base = (packed(tensor) for tensor in (codes[:, part], step[:, of], base[:, of]))
            own_error = packed(error[:, part]).cpu()
            descend_block(
                bands_of(own_codes),
                own_codes.numpy(),
                own_step.numpy(),
                own_base.numpy(),
                units[:, :, of].contiguous().numpy(),
                levels,
                layout.has_minimum,
                table,
                not layout.values,
                gradient.numpy(),
                inner.numpy(),
                own_error.numpy(),
            )
            codes[:, part], step[:, of], base[:, of] = own_codes, own_step, own_base
            error[:, part] = own_error.to(error.device)


def _stored(coded: CodedBlocks, layout: Layout, codes: Tensor, step: Tensor, base: Tensor) -> CodedBlocks:
    """Blocks of other codes and of steps and minima [rows, groups] that are levels of the same units."""
    if layout.levels is None:
        return replace(coded, codes=codes, scale=step, minimum=base)
    level = torch.where(coded.unit == 0, coded.level, _levels(step, coded.unit))
    minimum_level = torch.where(coded.minimum_unit == 0, coded.minimum_level, _levels(base, coded.minimum_unit))
    return replace(coded, codes=codes, level=level, minimum_level=minimum_level)


def _levels(numbers: Tensor, unit: Tensor) -> Tensor:
    return torch.round(numbers / torch.where(unit == 0, torch.ones_like(unit), unit)).int()
