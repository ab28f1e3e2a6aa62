"""Products in 8-bit integers beside float64: how far they may be off, and when they are not taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.maths.eight_bit import LARGEST_ERROR, EightBitWeight, eight_bit_weight


def layer(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """A weight [out, in], a bias and inputs [2, 50, in]."""
    made = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 256, generator=made) * 0.05
    return weight, torch.randn(96, generator=made), torch.randn(2, 50, 256, generator=made).to(dtype)


def coded(weight: Tensor, bias: Tensor | None, inputs: Tensor) -> EightBitWeight:
    made = eight_bit_weight(weight, bias, inputs)
    assert made is not None
    return made


def off_by(found: Tensor, weight: Tensor, bias: Tensor | None, inputs: Tensor) -> float:
    """Root mean square of the error, as a share of what the products alone have."""
    product = inputs.double() @ weight.double().T
    offset = 0 if bias is None else bias.double()
    return float((found.double() - offset - product).norm() / product.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
def test_near_float64(dtype: torch.dtype, biased: bool) -> None:
    weight, bias, inputs = layer(dtype)
    given = bias if biased else None
    product = coded(weight, given, inputs)
    found = product(inputs)
    assert found.dtype == torch.float32 and found.shape == (2, 50, 96)
    assert off_by(found, weight, given, inputs) < 0.015
    rounded = product(inputs, torch.bfloat16)
    assert torch.equal(rounded, found.bfloat16()), "rounded half to even, as torch does"


def test_what_the_codes_stand_for_is_what_is_multiplied() -> None:
    """Nothing is lost beside the two roundings: codes times their steps in float64 give the same numbers."""
    weight, _, inputs = layer()
    product = coded(weight, None, inputs)
    balanced = inputs * product.factors
    steps = balanced.abs().amax(dim=-1, keepdim=True) / 127
    codes = (balanced / steps).round()
    each, ones, nothing = torch.eye(weight.shape[1], dtype=torch.int8), torch.ones, torch.zeros(len(weight))
    weights = product.codes.scaled_products(each, ones(len(each)), ones(len(weight)), nothing).double()
    expected = (codes.double() * steps.double()) @ (weights * product.steps.double())
    apart = (product(inputs).double() - expected).abs().max() / expected.abs().max()
    assert float(apart) < 2e-2 / 127, "a code may fall to either side of a half, and no more"


@pytest.mark.parametrize("outlier", [30.0, 1e4])
def test_a_large_column_does_not_coarsen_the_others(outlier: float) -> None:
    weight, _, inputs = layer()
    inputs[..., 7] *= outlier
    weight[:, 7] /= outlier
    assert off_by(coded(weight, None, inputs)(inputs), weight, None, inputs) < 0.015


def test_a_huge_token_does_not_coarsen_the_others() -> None:
    weight, _, inputs = layer()
    product = coded(weight, None, inputs)
    inputs[0, 0] *= 1e4
    found = product(inputs)
    assert off_by(found[0, 1:], weight, None, inputs[0, 1:]) < 0.015


def test_inputs_that_eight_bits_do_not_hold_are_left_to_others() -> None:
    """Every token has two values of its own far above the rest, whose products cancel."""
    weight, _, inputs = layer()
    rows = inputs.view(-1, 256)
    weight[:, 100:200] = -weight[:, :100]
    for i in range(len(rows)):
        rows[i, i] = rows[i, 100 + i] = 1e3
    assert eight_bit_weight(weight, None, inputs) is None
    assert 0.01 < LARGEST_ERROR < 0.1


def test_columns_and_rows_of_zeros() -> None:
    weight, bias, inputs = layer()
    inputs[..., 3] = 0
    weight[:, 5] = 0
    weight[9] = 0
    inputs[1, 4] = 0
    found = coded(weight, bias, inputs)(inputs)
    assert off_by(found, weight, bias, inputs) < 0.015
    assert torch.equal(found[..., 9], bias[9].expand(2, 50)) and torch.equal(found[1, 4], bias)


def test_what_is_not_finite_is_not_hidden() -> None:
    weight, _, inputs = layer()
    product = coded(weight, None, inputs)
    for bad in (float("nan"), float("inf")):
        inputs[1, 7, 9] = bad
        for dtype in (torch.float32, torch.bfloat16):
            found = product(inputs, dtype)
            assert not found[1, 7].isfinite().any() and bool(found[0].isfinite().all())
    assert eight_bit_weight(weight, None, inputs[1]) is None
