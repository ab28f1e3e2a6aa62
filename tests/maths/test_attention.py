"""Causal attention beside float64: what rounding to the values' dtype may do, and no more."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.maths.attention import CHUNK, causal_attention

HALF_STEP = 2.0**-8
"""The most that rounding to bfloat16 changes a number by, as a share of it."""

SHAPES = [  # heads, key heads, length, width, value width
    pytest.param(4, 4, 48, 16, 16, id="a head each"),
    pytest.param(6, 2, 300, 16, 16, id="shared heads, chunks and a rest"),
    pytest.param(2, 1, CHUNK, 8, 8, id="one chunk"),
    pytest.param(3, 3, 2 * CHUNK, 24, 16, id="narrow values"),
    pytest.param(2, 2, 1, 8, 8, id="one token"),
]


def _tensors(heads: int, groups: int, length: int, width: int, wide: int, spread: float = 1.0) -> list[Tensor]:
    made = torch.Generator().manual_seed(length)
    sizes = [(2, heads, length, width), (2, groups, length, width), (2, groups, length, wide)]
    query, key, value = (torch.randn(size, generator=made) for size in sizes)
    return [query * spread, key, value.bfloat16()]


def _exact(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The output [batch, length, heads, width] in float64, and the same of the values' sizes."""
    shared, length = query.shape[1] // key.shape[1], query.shape[2]
    keys, values = (x.double().repeat_interleave(shared, dim=1) for x in (key, value))
    scores = (query.double() @ keys.mT) * scale
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return (weights @ values).transpose(1, 2), (weights @ values.abs()).transpose(1, 2)


@pytest.mark.parametrize(("heads", "groups", "length", "width", "wide"), SHAPES)
@pytest.mark.parametrize("spread", [1.0, 40.0], ids=["even", "peaked"])
def test_near_float64(heads: int, groups: int, length: int, width: int, wide: int, spread: float) -> None:
    query, key, value = _tensors(heads, groups, length, width, wide, spread)
    found = causal_attention(query, key, value, width**-0.5)
    exact, sizes = _exact(query, key, value, width**-0.5)
    assert found.dtype == torch.bfloat16
    # weights and the output are rounded once each; float32 scores of up to some hundreds are off by 1e-4 at most
    assert bool(((found.double() - exact).abs() <= 2.1 * HALF_STEP * sizes + 1e-30).all())


@pytest.mark.parametrize(("heads", "groups", "length", "width", "wide"), SHAPES)
def test_float32_values_keep_float32(heads: int, groups: int, length: int, width: int, wide: int) -> None:
    query, key, value = _tensors(heads, groups, length, width, wide)
    found = causal_attention(query, key, value.float(), width**-0.5)
    exact, sizes = _exact(query, key, value, width**-0.5)
    assert found.dtype == torch.float32
    assert bool(((found.double() - exact).abs() <= 2e-6 * sizes + 1e-30).all())


def test_nearer_than_pytorchs_kernel() -> None:
    query, key, value = _tensors(6, 2, 300, 32, 32, 4.0)
    exact, _ = _exact(query, key, value, 0.2)
    found = causal_attention(query, key, value, 0.2)
    theirs = F.scaled_dot_product_attention(
        query.bfloat16(), key.bfloat16(), value, is_causal=True, enable_gqa=True, scale=0.2
    ).transpose(1, 2)
    assert (found.double() - exact).abs().mean() < 0.9 * (theirs.double() - exact).abs().mean()


def test_tokens_see_nothing_behind_them() -> None:
    query, key, value = _tensors(4, 2, 200, 16, 16)
    before = causal_attention(query, key, value, 0.25)
    key[:, :, 150:], value[:, :, 150:] = 1e4, 1e4
    after = causal_attention(query, key, value, 0.25)
    assert torch.equal(after[:, :150], before[:, :150])
    assert not torch.equal(after[:, 150:], before[:, 150:])


def test_nan_in_a_score_is_not_hidden() -> None:
    query, key, value = _tensors(2, 2, 140, 16, 16)
    query[0, 0, 70] = float("nan")
    found = causal_attention(query, key, value, 0.25)
    assert bool(found[0, 70, 0].isnan().all())
    assert int(found.isnan().any(dim=-1).sum()) == 1
