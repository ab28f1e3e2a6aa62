"""INT8 against the definition in float64 and against bitsandbytes' own decoding."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.formats.bitsandbytes import pack_int8
from quantkit.methods.base import BlockWeights
from quantkit.methods.int8 import INT8, quantize_rows
from quantkit.model.blocks import Block
from quantkit.tensors import Int8Rows

SHAPES = [(64, 64), (5, 7), (1, 3), (33, 130)]


def random_weight(out_features: int, in_features: int) -> Tensor:
    generator = torch.Generator().manual_seed(out_features * 1000 + in_features)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.05
    weight[0, -1] = 3.0  # an outlier
    return weight


def given(weight: Tensor) -> BlockWeights:
    return BlockWeights(Block(0, "", ("up",), (), ()), {"up": weight})


def quantize(weight: Tensor, method: INT8 | None = None) -> Int8Rows:
    result = (method or INT8()).quantize_block(given(weight), {})
    assert result.applied == {"up": "int8"}
    quantized = result.quantized["up"]
    assert isinstance(quantized, Int8Rows)
    return quantized


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_the_nearest_of_the_row(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = random_weight(*shape).to(dtype)
    before = weight.clone()
    quantized = quantize(weight)
    exact = weight.half().double()
    absmax = exact.abs().amax(dim=1)
    assert torch.equal(quantized.absmax.double(), absmax)
    assert quantized.codes.dtype == torch.int8 and quantized.absmax.dtype == torch.float32
    position = exact * 127 / absmax[:, None]
    distance = (quantized.codes.double() - position).abs()
    assert float(distance.max()) <= 0.5 + 127 * 2**-23  # a tie may fall either way in float32
    assert torch.equal(weight, before)


@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_is_that_of_bitsandbytes_to_the_last_bit_of_float32(shape: tuple[int, int]) -> None:
    from bitsandbytes.functional import int8_vectorwise_dequant

    quantized = quantize_rows(random_weight(*shape).half())
    ours, theirs = quantized.dequantize(), int8_vectorwise_dequant(quantized.codes, quantized.absmax)
    # theirs multiplies by a rounded 1/127 at another place: one unit in the last place of float32
    assert bool(((ours - theirs).abs() <= theirs.abs() * 2**-23).all())
    assert torch.equal(ours.half(), theirs.half())


def test_a_row_of_zeros_decodes_to_zeros() -> None:
    weight = random_weight(4, 8)
    weight[2] = 0
    decoded = quantize(weight).dequantize()
    assert torch.equal(decoded[2], torch.zeros(8))
    assert float((decoded - weight).abs().max()) <= 3.0 / 254 + 1e-3  # half a step, and what float16 rounds


def test_the_error_is_half_a_step_at_most() -> None:
    weight = random_weight(33, 130).half()
    error = (quantize(weight).dequantize().double() - weight.double()).abs().amax(dim=1)
    step = weight.double().abs().amax(dim=1) / 127
    assert bool((error <= step / 2 * (1 + 1e-4)).all())


@pytest.mark.parametrize("shape", SHAPES)
def test_predicted_bits_are_those_stored(shape: tuple[int, int]) -> None:
    stored = pack_int8("up.weight", quantize(random_weight(*shape)))
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert INT8().predicted_bits(*shape) == pytest.approx(size * 8 / (shape[0] * shape[1]), abs=1e-12)


def test_any_shape_fits() -> None:
    assert INT8().misfit(3, 5) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(bad: float) -> None:
    weight = random_weight(4, 8)
    weight[1, 2] = bad
    with pytest.raises(ModelError, match=r"up\.weight: 1 of 32 values"):
        quantize(weight)


def test_a_weight_beyond_float16_is_refused() -> None:
    weight = random_weight(4, 8)
    weight[1, 2] = 1e5
    with pytest.raises(ModelError, match=r"up\.weight: values up to 9.98e\+04 do not fit float16"):
        quantize(weight.bfloat16())


def test_bitsandbytes_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing it takes longer than quantizing a small model, and 100 MB."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert quantize(random_weight(4, 8)).shape == (4, 8)
