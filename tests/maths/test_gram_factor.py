from __future__ import annotations

import pytest
import torch

from oracles.grams import factor_of
from quantkit.errors import ModelError
from quantkit.maths import gram_factor as module
from quantkit.maths.gram_factor import factored


def _exact(gram: torch.Tensor, damp: float) -> torch.Tensor:
    """R with R R^T = H + damping, by the Cholesky factor of the inverse in float64."""
    wide = gram.double()
    wide = wide + torch.eye(len(wide), dtype=torch.float64) * damp * wide.diagonal().mean()
    return torch.linalg.inv(torch.linalg.cholesky(torch.linalg.inv(wide), upper=True))


def test_damping_rises_when_the_factorization_fails_and_says_so() -> None:
    inputs = torch.randn(100, 24, generator=torch.Generator().manual_seed(0))
    values, vectors = torch.linalg.eigh(inputs.T @ inputs)
    values[0] = -0.05 * values.mean()  # what rounding errors of a huge Gram can do
    indefinite = vectors @ torch.diag(values) @ vectors.T
    factor = factor_of(indefinite, 0.01, False)
    assert factor.damp == pytest.approx(0.1)
    product = factor.upper.double() @ factor.upper.double().T
    mean = float(indefinite.diagonal().double().mean())
    damped = indefinite.double() + torch.eye(24) * 0.1 * mean
    assert torch.allclose(product, damped, atol=1e-5 * mean)


def test_a_hopeless_gram_is_an_error() -> None:
    with pytest.raises(ModelError, match="not positive definite"):
        factor_of(torch.eye(8) - 10 * torch.ones(8, 8) + 10 * torch.eye(8), 0.01, True)
    with pytest.raises(ModelError, match="NaN"):
        factor_of(torch.full((8, 8), float("nan")), 0.01, True)


def test_a_factor_in_float32_is_that_of_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.randn(1500, 900, generator=torch.Generator().manual_seed(0))
    mix = torch.randn(900, 900, generator=torch.Generator().manual_seed(1)) / 30 * torch.linspace(0.2, 4.0, 900)
    gram = (inputs @ mix).T @ (inputs @ mix)
    fast = factor_of(gram, 0.01, False).upper
    monkeypatch.setattr(module, "LEAST_PIVOT", 1.0)  # no pivot is good enough
    slow = factor_of(gram, 0.01, False).upper
    assert not torch.equal(fast, slow)
    exact = _exact(gram, 0.01)
    for found in (fast, slow):
        assert (found - exact).abs().max() < 2e-4 * exact.abs().max()


@pytest.mark.parametrize("size", [1, 2, 192, 193, 385, 386, 577])
def test_halves_of_any_size_join(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    inputs = torch.randn(2 * size + 5, size, generator=generator) * torch.linspace(0.2, 4.0, size)
    gram = inputs.T @ inputs
    found = factor_of(gram, 0.01, True)
    exact = _exact(gram[found.order][:, found.order], 0.01)
    assert (found.upper - exact).abs().max() < 2e-5 * exact.abs().max()


def test_where_float32_has_no_digits_left_float64_factors() -> None:
    """One direction holds nearly all of the inputs, so that what tells the columns apart is below its rounding."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(512, generator=generator).double().sign()
    apart = torch.randn(4000, 512, generator=generator).double()
    gram = (3e4 * torch.outer(direction, direction) + apart.T @ apart / 4000).float()
    found = factor_of(gram, 0.0, False).upper
    exact = _exact(gram, 0.0)
    assert (found - exact).abs().max() < 1e-3 * exact.abs().max()
    before = gram.triu() + gram.triu(1).T
    gram = before.clone()
    with factored(gram, 0.0, False):
        assert torch.equal(gram.tril(-1), before.tril(-1))
    assert torch.equal(gram, before)


def _case(columns: int) -> torch.Tensor:
    inputs = torch.randn(3 * columns, columns, generator=torch.Generator().manual_seed(columns))
    gram = inputs.T @ (inputs * torch.linspace(0.2, 4.0, 3 * columns)[:, None])
    return gram.triu() + gram.triu(1).T  # symmetric to the last bit, as sums of a run are


@pytest.mark.parametrize("columns", [24, 500])
@pytest.mark.parametrize("act_order", [False, True])
def test_a_factor_lies_in_the_matrix_and_gives_it_back(columns: int, act_order: bool) -> None:
    gram = _case(columns)
    gram[7] = gram[:, 7] = 0.0  # dead
    before = gram.clone()
    with factored(gram, 0.01, act_order) as factor:
        assert factor.upper.data_ptr() == gram.data_ptr() and not torch.equal(gram, before)
        assert torch.equal(gram.tril(-1), before.tril(-1))
    assert torch.equal(gram, before)


def test_the_matrix_comes_back_from_an_error_inside() -> None:
    gram = _case(24)
    before = gram.clone()
    with pytest.raises(KeyError), factored(gram, 0.01, True):
        raise KeyError
    assert torch.equal(gram, before)
    hopeless = torch.eye(8) - 10 * torch.ones(8, 8) + 10 * torch.eye(8)
    before = hopeless.clone()
    with pytest.raises(ModelError), factored(hopeless, 0.01, True):
        pass
    assert torch.equal(hopeless, before)


def test_a_matrix_in_float64_is_left_alone() -> None:
    gram = _case(24).double()
    before = gram.clone()
    with factored(gram, 0.01, True) as factor:
        assert torch.equal(gram, before) and factor.upper.dtype == torch.float32
    assert torch.equal(gram, before)
