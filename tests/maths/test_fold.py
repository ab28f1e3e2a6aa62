from __future__ import annotations

import numpy as np
import pytest
import torch

from oracles import awq as oracle
from quantkit.maths.fold import candidate_scale, search_scale, spread_over_heads, tie_over_heads
from quantkit.maths.gram import GramAccumulator
from quantkit.maths.measure import energies, sqnr_db
from quantkit.tensors import Grid


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gram_score_finds_the_scale_that_running_the_layer_finds(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(300, 48, generator=generator) * torch.logspace(-1.5, 1.5, 48)
    weight = torch.randn(20, 48, generator=generator)
    seen = GramAccumulator(48, torch.device("cpu"))
    seen.add(inputs[:100].reshape(4, 25, 48))
    seen.add(inputs[100:])
    statistics = seen.result()
    assert statistics.tokens == 300
    assert torch.allclose(statistics.gram, inputs.T @ inputs, rtol=1e-4, atol=1e-2)
    scale, exponent = search_scale(
        weight, statistics.mean_abs, statistics.gram, Grid(4, 16, symmetric), [k / 20 for k in range(20)]
    )
    expected, expected_exponent, losses = oracle.best_scale(weight.numpy(), inputs.numpy(), 16, 16, symmetric, 20)
    assert exponent == pytest.approx(expected_exponent)
    assert np.allclose(scale.numpy(), expected, rtol=1e-4)
    assert expected_exponent > 0 and min(losses) < losses[0] * 0.9, "the case must be one where a scale pays"


def test_scale_is_centred_and_survives_dead_channels() -> None:
    scale = candidate_scale(torch.tensor([0.0, 1.0, 4.0, 1e4]), 0.5)
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert float(scale.max() * scale.min()) == pytest.approx(1.0, rel=1e-4)


def test_heads_that_share_a_value_head_get_one_scale() -> None:
    values = torch.arange(12.0)  # two value heads of dimension 2, three query heads each
    tied = tie_over_heads(values, head_dim=2, repeats=3, reduce="mean")
    assert tied.tolist() == [2.0, 3.0, 8.0, 9.0]
    spread = spread_over_heads(tied, head_dim=2, repeats=3)
    assert spread.tolist() == [2.0, 3.0] * 3 + [8.0, 9.0] * 3
    assert torch.equal(tie_over_heads(spread, 2, 3, "first"), tied)


def test_sqnr_counts_in_decibels() -> None:
    weight = torch.ones(10, 10)
    assert sqnr_db(*energies(weight, [(weight * 0.9).flatten()])) == pytest.approx(20.0, abs=1e-3)
    assert sqnr_db(*energies(weight, weight.flatten().split(30))) is None
