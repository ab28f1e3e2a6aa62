"""Group-wise affine codes, such as GPTQ's and AWQ's, as ggml blocks of the same weights: no second rounding.

A block of 32 columns has one scale, so a group has to be whole blocks. Q4_0, Q5_0 and Q8_0 hold
`scale * (code - middle)`: any zero fits where code - zero stays inside the type's range.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.maths.ggml_codes import LAYOUTS, CodedBlocks, put
from quantkit.tensors import BlockTensor, GroupTensor

BLOCK = 32
"""Columns of a block in all three types."""

HOLDERS = ("Q4_0", "Q5_0", "Q8_0")
"""Types that hold an affine grid exactly, the smallest first."""


def exact_blocks(tensor: GroupTensor) -> BlockTensor:
    """The same weights in the smallest ggml type that holds every one of them.

    Four bits and fewer fit Q4_0 when symmetric, and Q5_0 at most when not; eight bits fit Q8_0 when symmetric. Q4_1
    keeps the minimum as a float16, which most products of a zero and a scale are not.
    Raises ModelError where no type holds them: groups that are not whole blocks, scales that are no float16 numbers,
    eight bits with zeros far from the middle.
    """
    rows, columns = tensor.shape
    if columns % BLOCK:
        raise ModelError(f"ggml blocks of {BLOCK} columns do not divide rows of {columns}")
    scale = _block_scales(tensor, tensor.scale)
    if not torch.equal(scale.half().float(), scale):
        raise ModelError("the scales are not float16 numbers, which is what ggml blocks keep")
    middle = torch.full_like(tensor.scale, 2 ** (tensor.grid.bits - 1)) if tensor.zero is None else tensor.zero.float()
    zero = _block_scales(tensor, middle).to(torch.int16).repeat_interleave(BLOCK, dim=1)
    steps = tensor.codes.to(torch.int16) - zero  # [out, in]
    least, most = (int(end) for end in steps.aminmax())
    for type_name in HOLDERS:
        low, bits = LAYOUTS[type_name].low, LAYOUTS[type_name].bits
        if low <= least and most < low + 2**bits:
            ones = torch.ones_like(scale, dtype=torch.int32)
            codes = (steps - low).to(torch.uint8)
            data = put(CodedBlocks(codes, scale, ones, torch.zeros_like(scale), ones), type_name)
            return BlockTensor(data, type_name, rows, columns)
    raise ModelError(
        f"codes lie {least} to {most} steps from their zero; {HOLDERS[-1]}, the widest type of one scale a block, "
        f"holds {LAYOUTS[HOLDERS[-1]].low} to {-LAYOUTS[HOLDERS[-1]].low - 1}",
        hint="quantize with a symmetric grid",
    )


def _block_scales(tensor: GroupTensor, numbers: Tensor) -> Tensor:
    """What each block's group has of [out, groups]: [out, blocks]. Raises ModelError when a block has two groups."""
    group = tensor.column_groups().view(-1, BLOCK)  # [blocks, 32]
    mixed = int((group != group[:, :1]).any(dim=1).sum())
    if mixed:
        raise ModelError(
            f"{mixed} of {len(group)} blocks of {BLOCK} columns lie in several groups; ggml keeps one scale each",
            hint=f"quantize with groups of {BLOCK} columns or a multiple, in order",
        )
    return numbers[:, group[:, 0]]
