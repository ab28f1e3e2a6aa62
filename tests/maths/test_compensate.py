from __future__ import annotations

import numpy as np
import pytest
import torch

from oracles.gptq import gptq
from oracles.grams import factor_of
from quantkit.maths import compensate, products
from quantkit.maths.affine import full_range, grid_for_range
from quantkit.maths.compensate import round_compensated
from quantkit.tensors import Grid


def _case(rows: int, columns: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(tokens, columns, generator=generator) @ mix * torch.linspace(0.2, 4.0, columns)
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_equal_the_oracle(bits: int, symmetric: bool, act_order: bool) -> None:
    weight, gram = _case(6, 48, 400)
    grid = Grid(bits, 16, symmetric)
    scale, zero = grid_for_range(*full_range(weight, grid), grid)
    middle = np.full(scale.shape, 2 ** (bits - 1)) if zero is None else zero.numpy()
    codes = round_compensated(weight, scale, zero, grid, factor_of(gram, 0.01, act_order))
    expected = gptq(weight.numpy(), scale.numpy(), middle, gram.numpy(), 16, grid.levels, 0.01, act_order)
    assert np.array_equal(codes.numpy(), expected)


@pytest.mark.parametrize("columns", [40, 128, 136, 300])
def test_blocks_join_without_a_seam(columns: int) -> None:
    """Columns past the first block see the errors of all before them: whole matrices against the unblocked oracle."""
    weight, gram = _case(3, columns, 2 * columns, seed=columns)
    grid = Grid(4, None, False)
    scale, zero = grid_for_range(*full_range(weight, grid), grid)
    assert zero is not None
    codes = round_compensated(weight, scale, zero, grid, factor_of(gram, 0.01, True))
    expected = gptq(weight.numpy(), scale.numpy(), zero.numpy(), gram.numpy(), columns, 16, 0.01, True)
    # float32 against float64: a value on the edge between two codes may fall either way and is then compensated for
    assert (codes.numpy() != expected).mean() < 0.005


@pytest.mark.parametrize("rows", [16, 17, 33])
def test_rows_come_in_bands_without_a_seam(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = _case(rows, 300, 600)
    grid = Grid(4, 60, True)
    scale, zero = grid_for_range(*full_range(weight, grid), grid)
    factor = factor_of(gram, 0.01, True)
    whole = round_compensated(weight, scale, zero, grid, factor)
    seen = []
    add = compensate.add_times_transposed
    monkeypatch.setattr(compensate, "add_times_transposed", lambda *given: seen.append(len(given[1])) or add(*given))
    monkeypatch.setattr(products, "BAND_VALUES", 8 * 300)
    bands = round_compensated(weight, scale, zero, grid, factor)
    assert sum(seen) == 2 * rows and max(seen) <= 8 and min(seen) > 1, "behind each of two blocks"
    assert (bands != whole).float().mean() < 0.005


def test_dead_columns_and_outliers() -> None:
    weight, gram = _case(4, 32, 300)
    gram[5, :] = gram[:, 5] = 0.0
    gram[9, :] *= 1e4
    gram[:, 9] *= 1e4
    weight[2] = 0.0
    grid = Grid(4, 16, True)
    scale, zero = grid_for_range(*full_range(weight, grid), grid)
    factor = factor_of(gram, 0.01, True)
    codes = round_compensated(weight, scale, zero, grid, factor)
    middle = np.full(scale.shape, 8)
    expected = gptq(weight.numpy(), scale.numpy(), middle, gram.numpy(), 16, 16, 0.01, True)
    assert np.array_equal(codes.numpy(), expected)
    assert factor.dead.tolist().index(True) == 5 and int(factor.dead.sum()) == 1
    assert (codes[2] == 8).all()


def test_fewer_tokens_than_columns() -> None:
    weight, gram = _case(4, 64, 10)
    grid = Grid(4, 32, False)
    scale, zero = grid_for_range(*full_range(weight, grid), grid)
    assert zero is not None
    codes = round_compensated(weight, scale, zero, grid, factor_of(gram, 0.01, True))
    expected = gptq(weight.numpy(), scale.numpy(), zero.numpy(), gram.numpy(), 32, 16, 0.01, True)
    assert (codes.numpy() != expected).mean() < 0.02


def test_the_compiled_loop_equals_the_tensor_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that a GPU takes gives the codes of the compiled one."""
    weight, gram = _case(16, 200, 500)
    grid = Grid(4, 40, False)
    scale, zero = grid_for_range(*full_range(weight, grid), grid)
    factor = factor_of(gram, 0.01, True)
    compiled = round_compensated(weight, scale, zero, grid, factor)
    monkeypatch.setattr(compensate, "_round_block", compensate._round_block_tensors)
    plain = round_compensated(weight, scale, zero, grid, factor)
    assert (compiled != plain).float().mean() < 0.005
