from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from oracles import descent as oracle
from quantkit.maths import refine as module
from quantkit.maths.affine import full_range, grid_for_range, nearest_codes
from quantkit.maths.refine import damped, descend, refine, refit_scale
from quantkit.tensors import Grid, GroupTensor


def _case(
    symmetric: bool, columns: int = 24, rows: int = 4
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Grid, Tensor]:
    generator = torch.Generator().manual_seed(columns)
    inputs = torch.randn(3 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    gram = damped(inputs.T @ inputs, 0.01)
    weight = torch.randn(rows, columns, generator=generator)
    grid = Grid(3, 8, symmetric)
    scale, zero = grid_for_range(*full_range(weight, grid), grid)
    return weight, nearest_codes(weight, scale, zero, grid), scale, zero, grid, gram


def _middle(scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    return torch.full_like(scale, 2.0 ** (grid.bits - 1)) if zero is None else zero.float()


def _loss(weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid, gram: Tensor) -> float:
    error = (GroupTensor(codes, scale, zero, grid).dequantize() - weight).double()
    return float(((error @ gram.double()) * error).sum())


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_sweep_equals_the_oracle(symmetric: bool) -> None:
    weight, codes, scale, zero, grid, gram = _case(symmetric)
    middle = _middle(scale, zero, grid)
    moved = descend(weight, codes, scale, middle, grid, gram)
    arrays = [tensor.double().numpy() for tensor in (weight, codes, scale, middle, gram)]
    assert np.array_equal(moved.numpy(), oracle.sweep(*arrays, 8, 8))
    assert not torch.equal(moved, codes)


@pytest.mark.parametrize("symmetric", [True, False])
def test_refitted_scales_are_the_least_squares_ones(symmetric: bool) -> None:
    weight, codes, scale, zero, grid, gram = _case(symmetric)
    middle = _middle(scale, zero, grid)
    fitted = refit_scale(weight, codes, scale, middle, grid, gram)
    assert torch.equal(fitted, fitted.half().float())
    for row in range(len(weight)):
        expected = oracle.fitted_scale(
            weight[row].double().numpy(), codes[row].numpy(), middle[row].numpy(), gram.double().numpy(), 8
        )
        inside = (expected > 0.5 * scale[row].numpy()) & (expected < 2 * scale[row].numpy())
        if inside.all():
            assert np.allclose(fitted[row].numpy(), expected, rtol=2e-3)


@pytest.mark.parametrize("columns", [24, 136, 264])
def test_the_loss_falls_with_every_step(columns: int) -> None:
    weight, codes, scale, zero, grid, gram = _case(False, columns, rows=8)
    middle = _middle(scale, zero, grid)
    losses = [_loss(weight, codes, scale, zero, grid, gram)]
    for _ in range(3):
        codes = descend(weight, codes, scale, middle, grid, gram)
        losses.append(_loss(weight, codes, scale, zero, grid, gram))
        scale = refit_scale(weight, codes, scale, middle, grid, gram)
        losses.append(_loss(weight, codes, scale, zero, grid, gram))
    assert all(after < before * 1.001 for before, after in zip(losses, losses[1:], strict=False)), losses
    assert losses[-1] < 0.6 * losses[0]


def test_all_zero_rows_and_dead_columns_stay() -> None:
    weight, codes, scale, zero, grid, gram = _case(True)
    weight[1] = 0.0
    scale[1] = 1.0
    codes[1] = 4
    raw = gram.clone()
    raw[3] = raw[:, 3] = 0.0
    new_codes, new_scale = refine(weight, codes, scale, zero, grid, damped(raw, 0.01), 2)
    assert (new_codes[1] == 4).all() and torch.isfinite(new_scale).all()
    values = (new_codes.float() - 4) * new_scale.repeat_interleave(8, dim=1)
    inside = (weight[:, 3] / new_scale[:, 0]).abs() < 3
    assert ((values - weight)[:, 3].abs()[inside] <= new_scale[:, 0][inside] / 2 * 1.01).all()


def test_the_compiled_sweep_equals_the_tensor_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, codes, scale, zero, grid, gram = _case(False, 200, rows=16)
    middle = _middle(scale, zero, grid)
    compiled = descend(weight, codes, scale, middle, grid, gram)
    monkeypatch.setattr(module, "_descend_block", module._descend_block_tensors)
    plain = descend(weight, codes, scale, middle, grid, gram)
    assert (compiled != plain).float().mean() < 0.01
