from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from oracles.grams import damped_copy
from quantkit.maths import pairs
from quantkit.maths import refine as refine_module
from quantkit.maths.affine import nearest_codes, search_grid
from quantkit.maths.pairs import DEAREST, LEAST_GAIN, _sweep_pairs_tensors, move_pairs
from quantkit.maths.refine import refine
from quantkit.tensors import Grid, GroupTensor


def problem(columns: int, rows: int, grid: Grid) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """A weight, its nearest codes, scales and zeros, and the Gram matrix of inputs that are much alike."""
    generator = torch.Generator().manual_seed(columns)
    inputs = torch.randn(4 * columns, columns, generator=generator)
    inputs = inputs @ (torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5)
    weight = torch.randn(rows, columns, generator=generator)
    gram = damped_copy(inputs.T @ inputs, 0.01)
    scale, zero = search_grid(weight, grid, gram.diagonal())
    return weight, nearest_codes(weight, scale, zero, grid), scale, zero, gram


def lost(weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid, gram: Tensor) -> Tensor:
    """float64 [rows]."""
    error = (GroupTensor(codes, scale, zero, grid).dequantize() - weight).double()
    return ((error @ gram.double()) * error).sum(dim=1)


def error_of(weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    return GroupTensor(codes, scale, zero, grid).dequantize() - weight


@pytest.mark.parametrize("symmetric", [False, True])
def test_no_row_gets_worse_and_some_get_better_than_by_single_codes(symmetric: bool) -> None:
    grid = Grid(4, 16, symmetric)
    weight, codes, scale, zero, gram = problem(64, 40, grid)
    codes, scale = refine(weight, codes, scale, zero, grid, gram, 20)
    before = lost(weight, codes, scale, zero, grid, gram)
    moved, error = codes.clone(), error_of(weight, codes, scale, zero, grid)
    move_pairs(moved, scale, error, gram, grid.levels)
    torch.testing.assert_close(error, error_of(weight, moved, scale, zero, grid))
    after = lost(weight, moved, scale, zero, grid, gram)
    assert (after <= before * (1 + 1e-6)).all()
    assert (after < before * 0.999).float().mean() > 0.2
    assert after.sum() < 0.99 * before.sum()


def test_behind_enough_sweeps_no_pair_gains_anything() -> None:
    """Every pair of a column's cheaper move, cheap enough, and any other move, tried one by one in float64."""
    grid = Grid(2, 6, False)
    weight, codes, scale, zero, gram = problem(12, 5, grid)
    steps = scale.repeat_interleave(6, dim=1)
    for _ in range(30):
        move_pairs(codes, scale, error_of(weight, codes, scale, zero, grid), gram, grid.levels)
    error, exact = error_of(weight, codes, scale, zero, grid).double(), gram.double()
    tried = 0
    for row, j, k in itertools.product(range(5), range(12), range(12)):
        slope = (error[row] @ exact) * steps[row]
        first = -1 if slope[j] > 0 else 1
        curve = 0.5 * float(steps[row, j] ** 2 * exact[j, j])
        if curve - abs(float(slope[j])) > (DEAREST - 1.1 * LEAST_GAIN) * curve:
            continue  # too dear to look for a partner
        for second in (-1, 1):
            landed = int(codes[row, j]) + first, int(codes[row, k]) + second
            if j == k or not all(0 <= code < grid.levels for code in landed):
                continue
            other = error[row].clone()
            other[j] += first * steps[row, j]
            other[k] += second * steps[row, k]
            # the loss is twice what slopes and curves of half the steps' squares add up to
            assert other @ exact @ other > error[row] @ exact @ error[row] - 2.2 * LEAST_GAIN * curve
            tried += 1
    assert tried > 100


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_compiled_sweep_equals_the_tensor_sweep(symmetric: bool) -> None:
    grid = Grid(4, 16, symmetric)
    weight, codes, scale, zero, gram = problem(48, 33, grid)
    steps, error = scale.repeat_interleave(16, dim=1), error_of(weight, codes, scale, zero, grid)
    compiled, by_tensors = codes.clone(), codes.clone()
    _sweep_pairs_tensors(by_tensors, steps, error @ gram, gram, grid.levels)
    move_pairs(compiled, scale, error, gram, grid.levels)
    assert (compiled != codes).float().mean() > 0.05
    assert (compiled == by_tensors).all(dim=1).float().mean() > 0.9, "sums in another order may choose another of two"


def test_pairs_follow_the_descent_and_bring_the_loss_below_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Grid(4, 16, False)
    weight, codes, scale, zero, gram = problem(64, 40, grid)

    def total(sweeps: int, sweeps_of_pairs: int) -> float:
        found = refine(weight, codes, scale, zero, grid, gram, sweeps, sweeps_of_pairs)
        return float(lost(weight, *found, zero, grid, gram).sum())

    assert total(2, 2) < 0.97 * total(4, 0)
    calls = []
    monkeypatch.setattr(refine_module, "move_pairs", lambda *given: calls.append(given))
    refine(weight, codes, scale, zero, grid, gram, 2, 3)
    assert len(calls) == 3
    for found, steps, error, matrix, levels in calls:
        assert found.shape == error.shape == weight.shape and steps.shape == scale.shape
        assert matrix is gram and levels == 16


def test_bands_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Grid(4, 16, False)
    weight, codes, scale, zero, gram = problem(48, 33, grid)
    whole, banded = codes.clone(), codes.clone()
    move_pairs(whole, scale, error_of(weight, codes, scale, zero, grid), gram, grid.levels)
    monkeypatch.setattr(pairs, "ROW_BAND", 5)
    move_pairs(banded, scale, error_of(weight, codes, scale, zero, grid), gram, grid.levels)
    assert (whole == banded).all(dim=1).float().mean() > 0.9, "products of other shapes may sum in another order"
    assert not torch.equal(banded[-3:], codes[-3:])
