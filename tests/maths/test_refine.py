from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from oracles import descent as oracle
from oracles.grams import damped_copy
from quantkit.maths import products
from quantkit.maths import refine as module
from quantkit.maths.affine import full_range, grid_for_range, nearest_codes
from quantkit.maths.refine import damped, refine
from quantkit.tensors import Grid, GroupTensor


def _case(
    symmetric: bool, columns: int = 24, rows: int = 4
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Grid, Tensor]:
    generator = torch.Generator().manual_seed(columns)
    inputs = torch.randn(3 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    gram = damped_copy(inputs.T @ inputs, 0.01)
    weight = torch.randn(rows, columns, generator=generator)
    grid = Grid(3, 8, symmetric)
    scale, zero = grid_for_range(*full_range(weight, grid), grid)
    return weight, nearest_codes(weight, scale, zero, grid), scale, zero, grid, gram


def _middle(scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    return torch.full_like(scale, 2.0 ** (grid.bits - 1)) if zero is None else zero.float()


def _loss(weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid, gram: Tensor) -> float:
    error = (GroupTensor(codes, scale, zero, grid).dequantize() - weight).double()
    return float(((error @ gram.double()) * error).sum())


@pytest.mark.parametrize("columns", [24, 136])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_sweep_equals_the_oracle(symmetric: bool, columns: int) -> None:
    weight, codes, scale, zero, grid, gram = _case(symmetric, columns)
    middle = _middle(scale, zero, grid)
    moved, fitted = refine(weight, codes, scale, zero, grid, gram, 1)
    arrays = [tensor.double().numpy() for tensor in (weight, codes, scale, middle, gram)]
    expected_codes, expected_scale = oracle.sweep(*arrays, 8, 8)
    # float32 against float64: a code on the edge may fall either way, and its row goes its own way from there
    same = (moved.numpy() == expected_codes).all(axis=1)
    assert same.mean() >= 0.75
    assert np.array_equal(fitted.numpy()[same], expected_scale[same])
    assert not torch.equal(moved, codes) and not torch.equal(fitted, scale)
    assert torch.equal(fitted, fitted.half().float())


@pytest.mark.parametrize("columns", [24, 136, 264])
def test_the_loss_falls_with_every_sweep(columns: int) -> None:
    weight, codes, scale, zero, grid, gram = _case(False, columns, rows=8)
    losses = [_loss(weight, codes, scale, zero, grid, gram)]
    for _ in range(4):
        codes, scale = refine(weight, codes, scale, zero, grid, gram, 1)
        losses.append(_loss(weight, codes, scale, zero, grid, gram))
    assert all(after <= before * 1.0001 for before, after in zip(losses, losses[1:], strict=False)), losses
    assert losses[-1] < 0.6 * losses[0]


def test_whole_rows_are_one_group() -> None:
    weight, _, _, _, _, gram = _case(False, 24)
    grid = Grid(4, None, True)
    scale, zero = grid_for_range(*full_range(weight, grid), grid)
    codes = nearest_codes(weight, scale, zero, grid)
    better = refine(weight, codes, scale, zero, grid, gram, 2)
    assert _loss(weight, *better, zero, grid, gram) < _loss(weight, codes, scale, zero, grid, gram)


@pytest.mark.parametrize("value", [1.0, 0.1, 3.3e-3, 6.103e-5, 5e-5, 1.7e-6, 6e-8, 0.99999, 1000.3])
def test_scales_round_as_float16_does(value: float) -> None:
    from quantkit.maths.kernels import _as_float16

    assert _as_float16(value) == np.float32(np.float16(value))


def test_all_zero_rows_and_dead_columns_stay() -> None:
    weight, codes, scale, zero, grid, gram = _case(True)
    weight[1] = 0.0
    scale[1] = 1.0
    codes[1] = 4
    raw = gram.clone()
    raw[3] = raw[:, 3] = 0.0
    new_codes, new_scale = refine(weight, codes, scale, zero, grid, damped_copy(raw, 0.01), 2)
    assert (new_codes[1] == 4).all() and torch.isfinite(new_scale).all()
    values = (new_codes.float() - 4) * new_scale.repeat_interleave(8, dim=1)
    inside = (weight[:, 3] / new_scale[:, 0]).abs() < 3
    assert ((values - weight)[:, 3].abs()[inside] <= new_scale[:, 0][inside] / 2 * 1.01).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_compiled_sweep_equals_the_tensor_sweep(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, codes, scale, zero, grid, gram = _case(symmetric, 200, rows=16)
    compiled, compiled_scale = refine(weight, codes, scale, zero, grid, gram, 1)
    monkeypatch.setattr(module, "_descend_block", module._descend_block_tensors)
    plain, plain_scale = refine(weight, codes, scale, zero, grid, gram, 1)
    assert (compiled != plain).float().mean() < 0.01
    assert (compiled_scale != plain_scale).float().mean() < 0.02


@pytest.mark.parametrize("pairs", [0, 1])
def test_rows_come_in_bands_without_a_seam(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, codes, scale, zero, grid, gram = _case(False, 136, rows=33)
    whole = refine(weight, codes, scale, zero, grid, gram, 2, pairs)
    seen = []
    multiply = module.times_transposed
    monkeypatch.setattr(module, "times_transposed", lambda *given: seen.append(len(given[0])) or multiply(*given))
    monkeypatch.setattr(products, "BAND_VALUES", 8 * 136)
    bands = refine(weight, codes, scale, zero, grid, gram, 2, pairs)
    assert sum(seen) == 33 * len(seen) / 5 and {6, 7} == set(seen), "five bands"
    assert (bands[0] != whole[0]).float().mean() < 0.005
    assert torch.isclose(bands[1], whole[1]).float().mean() > 0.98


def test_damping_is_taken_back() -> None:
    *_, gram = _case(False)
    gram[3] = gram[:, 3] = 0.0
    before = gram.clone()
    mean = before.diagonal()[before.diagonal() > 0].mean()
    with pytest.raises(KeyError), damped(gram, 0.1) as matrix:
        assert matrix is gram
        assert torch.allclose(gram.diagonal(), torch.where(before.diagonal() > 0, before.diagonal(), mean) + 0.1 * mean)
        raise KeyError
    assert torch.equal(gram, before)
