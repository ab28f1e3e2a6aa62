"""What the formats of grouped affine weights check alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.formats.base import LinearPlan
from quantkit.tensors import Grid, GroupTensor, QuantizedTensor


def grid_of(method: Any) -> Grid | None:
    """The affine grid of a method's settings; None when the method has none."""
    grid = getattr(method, "grid", None)
    return grid if isinstance(grid, Grid) else None


def require_grid(plan: LinearPlan) -> Grid:
    """The grid of a linear that is quantized; one without means that `misfits` was not asked."""
    grid = grid_of(plan.method)
    assert grid is not None, f"{plan.name}: {plan.method} has no grid"
    return grid


def require_group_tensor(name: str, value: QuantizedTensor) -> GroupTensor:
    """The value as a GroupTensor; another kind means that `misfits` was not asked."""
    assert isinstance(value, GroupTensor), f"{name}: a {type(value).__name__} has no groups"
    return value


def float16_scale(name: str, scale: Tensor) -> Tensor:
    """The scales in float16, exactly. Raises ModelError when that would change one."""
    half = scale.to(torch.float16)
    if not torch.equal(half.float(), scale.float()):
        raise ModelError(f"{name}: scales that float16 cannot hold exactly; expected scales rounded to float16")
    return half


def group_problems(where: str, g_idx: Tensor, groups: int) -> list[str]:
    """What is wrong with the group of each column: int [in], each from 0 to groups - 1."""
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        return [f"{where}: found groups from {low} to {high}, expected 0 to {groups - 1}"]
    return []


def padding_problems(where: str, words: Tensor, count: int, bits: int) -> list[str]:
    """A line when bits behind the last of `count` codes are set: int32 [rows, words for count]."""
    used = count * bits % 32
    if used and bool((words[:, -1].long() & 0xFFFFFFFF).bitwise_right_shift(used).any()):
        return [f"{where}: found bits set behind the last code, expected zeros"]
    return []
