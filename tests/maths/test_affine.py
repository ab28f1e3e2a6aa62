from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from oracles import awq as oracle
from quantkit.maths import affine, products
from quantkit.maths.affine import (
    full_range,
    grid_for_range,
    nearest_codes,
    nearest_values,
    quantize_nearest,
    search_grid,
)
from quantkit.maths.kernels import STRIP
from quantkit.tensors import Grid

GRIDS = [Grid(bits, size, symmetric) for bits in (2, 3, 4, 8) for size in (8, 24, None) for symmetric in (True, False)]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.label().replace(" ", "-"))
def test_nearest_equals_the_plain_loop(grid: Grid) -> None:
    weight = torch.randn(5, 48, generator=torch.Generator().manual_seed(1))
    weight[1] = 0.0
    weight[2, 7] = 30.0
    made = quantize_nearest(weight, grid).dequantize()
    expected = oracle.rounded(weight.double().numpy(), grid.group_size or 48, grid.levels, grid.symmetric)
    # one step of tolerance is allowed nowhere: both round half to even on the same float16 scale
    assert np.abs(made.numpy() - expected).max() < 1e-4


def test_zero_rows_stay_zero_and_scales_are_float16() -> None:
    weight = torch.zeros(3, 32)
    weight[1] = 1e-9  # below float16's smallest step
    weight[2] = 1e4
    for symmetric in (True, False):
        made = quantize_nearest(weight, Grid(4, 16, symmetric))
        assert torch.equal(made.scale, made.scale.half().float())
        assert torch.isfinite(made.scale).all() and (made.scale > 0).all()
        assert made.dequantize()[0].abs().max() == 0
        assert made.dequantize()[1].abs().max() < 1e-6
        assert (made.dequantize()[2] - 1e4).abs().max() < 1e4 / 10


@pytest.mark.parametrize("symmetric", [True, False])
def test_range_search_finds_the_best_share_of_each_group(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(6, 32, generator=generator) ** 3
    inputs = torch.randn(200, 32, generator=generator) * torch.linspace(0.1, 3, 32)
    grid = Grid(4, 16, symmetric)
    shares = (1.0, 0.9, 0.8, 0.7)
    scale, zero = search_grid(weight, grid, inputs.T @ inputs, shrinks=shares, coarse=1)
    error = (nearest_values(weight, scale, zero, grid) - weight).double().numpy()
    losses = oracle.range_losses(weight.double().numpy(), inputs.double().numpy(), 16, 16, symmetric, shares)
    if symmetric:  # a negative scale sees the mirror image of the weights
        mirrored = oracle.range_losses(-weight.double().numpy(), inputs.double().numpy(), 16, 16, symmetric, shares)
        losses = np.concatenate((losses, mirrored))
        assert (scale < 0).any() and (scale > 0).any()
    for group in range(2):
        part = slice(group * 16, group * 16 + 16)
        loss = ((error[:, part] @ inputs[:, part].double().numpy().T) ** 2).sum(axis=1)
        assert np.allclose(loss, losses.min(axis=0)[:, group], rtol=1e-3)
    assert (losses.argmin(axis=0) > 0).any(), "the case must have groups whose best range is not the full one"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("blocks", [True, False])
def test_the_coarse_search_loses_next_to_nothing(symmetric: bool, blocks: bool) -> None:
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(64, 128, generator=generator)
    inputs = torch.randn(500, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    gram, grid = inputs.T @ inputs, Grid(4, 32, symmetric)
    seen = gram if blocks else gram.diagonal()
    matrix = (
        torch.block_diag(*(gram[at : at + 32, at : at + 32] for at in range(0, 128, 32))) if blocks else seen.diag()
    )

    def lost(*found: Tensor | None) -> float:
        error = (nearest_values(weight, found[0], found[1], grid) - weight).double()  # type: ignore[arg-type]
        return float(((error @ matrix.double()) * error).sum())

    every, coarse = (lost(*search_grid(weight, grid, seen, coarse=step)) for step in (1, affine.COARSE))
    plain = lost(*grid_for_range(*full_range(weight, grid), grid))
    assert every <= coarse < every * 1.01 < plain


def test_without_a_gram_the_search_never_loses_to_the_full_range() -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(3)) ** 3
    grid = Grid(3, 32, False)
    plain = nearest_values(weight, *grid_for_range(*full_range(weight, grid), grid), grid)
    searched = nearest_values(weight, *search_grid(weight, grid, None), grid)
    assert ((searched - weight) ** 2).sum() < ((plain - weight) ** 2).sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_compiled_search_equals_the_tensor_search(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(30, 96, generator=generator) ** 3
    importance = torch.rand(96, generator=generator) + 0.1
    grid = Grid(4, 24, symmetric)
    scale, zero = search_grid(weight, grid, importance)
    # a diagonal Gram takes the path of tensors and has the same loss
    plain_scale, plain_zero = search_grid(weight, grid, torch.diag(importance))
    assert (scale != plain_scale).float().mean() < 0.02
    if zero is not None and plain_zero is not None:
        assert (zero != plain_zero).float().mean() < 0.02


@pytest.mark.parametrize("size", [12, 32, 64])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("coarse", [1, 2, 4])
def test_compiled_scores_by_blocks_choose_what_the_tensors_choose(size: int, symmetric: bool, coarse: int) -> None:
    generator = torch.Generator().manual_seed(size)
    weight = torch.randn(50, 3 * size, generator=generator)
    inputs = torch.randn(400, 3 * size, generator=generator) @ torch.randn(3 * size, 3 * size, generator=generator)
    grid, gram = Grid(4, size, symmetric), inputs.T @ inputs
    low, high = full_range(weight, grid)
    shares = torch.tensor(affine.SHRINKS).view(-1, 1, 1)
    scale, zero = grid_for_range(low * shares, high * shares, grid)
    candidates = (scale, torch.full(scale.shape, 8, dtype=torch.uint8) if zero is None else zero)
    blocks = torch.stack([gram[at : at + size, at : at + size] for at in range(0, 3 * size, size)])
    by_tensors = affine._best_range_by_blocks_tensors(weight, grid, blocks, candidates, coarse)
    compiled = affine._best_range_by_blocks(weight, grid, affine.upper_bands(blocks, STRIP), candidates, coarse)
    assert (compiled != by_tensors).float().mean() < 0.02, "sums in another order may choose another of two alike"


def test_folded_bands_leave_the_loss_as_it_is() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, error = torch.randn(2, 90, 20, generator=generator), torch.randn(5, 20, generator=generator)
    matrices = inputs.mT @ inputs  # [2, 20, 20]
    folded = affine.upper_bands(matrices, 8)
    assert folded[:, 8:, :8].count_nonzero() == 0
    whole = ((error @ matrices) * error).sum(dim=-1)
    torch.testing.assert_close(((error @ folded) * error).sum(dim=-1), whole, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("of", ["gram", "diagonal", "nothing"])
def test_ranges_are_searched_in_bands_of_rows(of: str, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(5)
    weight, inputs = torch.randn(33, 48, generator=generator), torch.randn(200, 48, generator=generator)
    gram = inputs.T @ inputs
    seen = {"gram": gram, "diagonal": gram.diagonal(), "nothing": None}[of]
    grid = Grid(4, 16, symmetric)
    scale, zero = search_grid(weight, grid, seen)
    search, seen_rows = affine._search_rows, []
    monkeypatch.setattr(affine, "_search_rows", lambda *given: seen_rows.append(len(given[0])) or search(*given))
    monkeypatch.setattr(affine, "SMALL_BAND_VALUES", 8 * 48)
    monkeypatch.setattr(products, "BAND_VALUES", 8 * 48)
    own_scale, own_zero = search_grid(weight, grid, seen)
    assert sum(seen_rows) == 33 and set(seen_rows) == {6, 7}
    assert torch.equal(own_scale, scale)
    assert (own_zero is None and zero is None) or torch.equal(own_zero, zero)


@pytest.mark.parametrize("symmetric", [True, False])
def test_nearest_codes_come_in_bands_of_rows(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, grid = torch.randn(33, 48, generator=torch.Generator().manual_seed(5)), Grid(4, 16, symmetric)
    scale, zero = grid_for_range(*full_range(weight, grid), grid)
    middle = torch.full_like(scale, 8.0) if zero is None else zero.float()
    wanted = (weight.view(33, 3, 16) / scale.unsqueeze(2) + middle.unsqueeze(2)).round().clamp(0, 15)
    monkeypatch.setattr(affine, "SMALL_BAND_VALUES", 8 * 48)
    found = nearest_codes(weight, scale, zero, grid)
    assert found.dtype == torch.uint8 and torch.equal(found, wanted.view(33, 48).to(torch.uint8))
