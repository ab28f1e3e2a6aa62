"""Group-wise affine codes, such as GPTQ's and AWQ's, as ggml blocks of the same codes: no second rounding.

A block of 32 columns has one scale, so a group has to be whole blocks. Q4_0, Q5_0 and Q8_0 hold
`scale * (code - middle)`: any zero fits where code - zero stays inside the type's range. Q4_1 holds
`scale * code + minimum`: any zero fits where the minimum, -zero * scale, is a float16 number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.maths.ggml_codes import LAYOUTS, CodedBlocks, put
from quantkit.tensors import BlockTensor, GroupTensor

BLOCK = 32
"""Columns of a block in all these types."""

HOLDERS = ("Q4_0", "Q4_1", "Q5_0", "Q8_0")
"""Types that hold an affine grid, the smallest first."""


def holding_type(tensor: GroupTensor, *, exact: bool = True) -> str:
    """The smallest ggml type that holds every weight of a tensor, such as "Q4_0".

    Four bits and fewer fit Q4_0 when symmetric, and Q5_0 at most when not, since a product of a zero and a scale is
    seldom a float16 number; eight bits fit Q8_0 when symmetric. exact: False lets scales and minima be rounded to
    float16, so that four bits fit Q4_1; the codes stay.
    Raises ModelError where no type holds them: groups that are not whole blocks, scales that are no float16 numbers,
    eight bits with zeros far from the middle.
    """
    columns = tensor.shape[1]
    if columns % BLOCK:
        raise ModelError(f"ggml blocks of {BLOCK} columns do not divide rows of {columns}")
    scale = _of_blocks(tensor, tensor.scale)
    half = scale.half().float()
    if not bool(torch.isfinite(half).all()):
        raise ModelError(f"scales up to {float(scale.abs().max()):.3g} are out of float16's range, which ggml keeps")
    inexact = int((half != scale).sum())
    if exact and inexact:
        raise ModelError(
            f"{inexact} of {scale.numel()} scales are not float16 numbers, which is what ggml blocks keep",
            hint="--no-exact rounds scales and minima to float16; the codes stay",
        )
    zero = _zeros(tensor)
    steps = tensor.codes.to(torch.int16) - zero.repeat_interleave(BLOCK, dim=1)  # [out, in]
    least, most = (int(end) for end in steps.aminmax())
    minimum = scale * zero
    minima_fit = bool(torch.isfinite(minimum.half()).all())
    if exact:
        minima_fit = minima_fit and torch.equal(minimum.half().float(), minimum)
    for type_name in HOLDERS:
        layout = LAYOUTS[type_name]
        if layout.has_minimum:
            if minima_fit and tensor.grid.levels <= 2**layout.bits:
                return type_name
        elif layout.low <= least and most < layout.low + 2**layout.bits:
            return type_name
    raise ModelError(
        f"codes lie {least} to {most} steps from their zero; {HOLDERS[-1]}, the widest type of one scale a block, "
        f"holds {LAYOUTS[HOLDERS[-1]].low} to {-LAYOUTS[HOLDERS[-1]].low - 1}",
        hint="quantize with a symmetric grid",
    )


def to_blocks(tensor: GroupTensor, type_name: str) -> BlockTensor:
    """The same codes in a type that `holding_type` gave; scales and minima in float16."""
    layout = LAYOUTS[type_name]
    scale, zero = _of_blocks(tensor, tensor.scale), _zeros(tensor)
    codes, minimum = tensor.codes, torch.zeros_like(scale)
    if layout.has_minimum:
        minimum = scale * zero
    else:
        codes = (codes.to(torch.int16) - zero.repeat_interleave(BLOCK, dim=1) - layout.low).to(torch.uint8)
    ones = torch.ones_like(scale, dtype=torch.int32)
    return BlockTensor(put(CodedBlocks(codes, scale, ones, minimum, ones), type_name), type_name, *tensor.shape)


def _zeros(tensor: GroupTensor) -> Tensor:
    """The zero of each block: int16 [out, blocks]."""
    middle = torch.full_like(tensor.scale, 2 ** (tensor.grid.bits - 1)) if tensor.zero is None else tensor.zero
    return _of_blocks(tensor, middle).to(torch.int16)


def _of_blocks(tensor: GroupTensor, numbers: Tensor) -> Tensor:
    """What each block's group has of [out, groups]: [out, blocks]. Raises ModelError when a block has two groups."""
    group = tensor.column_groups().view(-1, BLOCK)  # [blocks, 32]
    mixed = int((group != group[:, :1]).any(dim=1).sum())
    if mixed:
        raise ModelError(
            f"{mixed} of {len(group)} blocks of {BLOCK} columns lie in several groups; ggml keeps one scale each",
            hint=f"quantize with groups of {BLOCK} columns or a multiple, in order",
        )
    return numbers[:, group[:, 0]]
