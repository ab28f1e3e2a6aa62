"""A block's weights with scales folded in, made from the stored ones when asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.methods.folded import FoldedWeights


def _weights(dtype: torch.dtype) -> tuple[FoldedWeights, dict[str, Tensor]]:
    """Weights with scales folded into "b", and what they should be."""
    generator = torch.Generator().manual_seed(0)
    stored = {name: torch.randn(rows, 8, generator=generator).to(dtype) for name, rows in (("a", 5), ("b", 7))}
    outputs, inputs = torch.rand(7, generator=generator) + 0.5, torch.rand(8, generator=generator) + 0.5
    weights = FoldedWeights(stored)
    weights.divide_outputs("b", outputs)
    weights.multiply_inputs("b", inputs)
    return weights, {"a": stored["a"].float(), "b": stored["b"].float() / outputs[:, None] * inputs}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_are_folded_in_their_order_and_what_is_stored_stays(dtype: torch.dtype) -> None:
    weights, wanted = _weights(dtype)
    for _ in range(2):
        assert all(torch.equal(weights[name], weight) for name, weight in wanted.items())
    assert torch.equal(weights.stacked(["a", "b"]), torch.cat([wanted["a"], wanted["b"]]))
    assert torch.equal(weights.stacked(["b"]), wanted["b"])


@pytest.mark.parametrize("count", [1, 2, 3, 5, 11, 12, 100])
def test_a_sample_is_rows_of_the_stack_at_even_distances(count: int) -> None:
    weights, wanted = _weights(torch.bfloat16)
    whole = torch.cat([wanted["a"], wanted["b"]])
    found = weights.sampled(["a", "b"], count)
    assert torch.equal(found, whole[:: -(-len(whole) // count)]) and len(found) <= count


def test_another_weight_has_nothing_folded_into_it() -> None:
    weights, wanted = _weights(torch.float32)
    weights["b"] = wanted["a"]
    assert weights["b"] is wanted["a"]
    weights.multiply_inputs("b", torch.full((8,), 2.0))
    assert torch.equal(weights["b"], wanted["a"] * 2)
    assert list(weights) == ["a", "b"] and len(weights) == 2
    del weights["a"]
    assert "a" not in weights and "b" in weights
