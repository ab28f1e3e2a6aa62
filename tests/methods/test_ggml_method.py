from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from quantkit.errors import ModelError
from quantkit.maths.ggml import encode
from quantkit.methods.base import BlockWeights
from quantkit.methods.ggml import GGML
from quantkit.model.blocks import Block
from quantkit.tensors import BlockTensor

BLOCK = Block(0, "model.layers.0.", ("model.layers.0.a", "model.layers.0.b"), (), ())


def _quantize(method: GGML, **weights: torch.Tensor) -> dict[str, BlockTensor]:
    given = {f"model.layers.0.{name}": weight for name, weight in weights.items()}
    result = method.quantize_block(BlockWeights(BLOCK, given), {})
    assert set(result.applied.values()) == {method.label()}
    assert all(isinstance(tensor, BlockTensor) for tensor in result.quantized.values())
    return result.quantized  # type: ignore[return-value]


def test_every_linear_becomes_the_bytes_of_its_type() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 64, generator=generator).half(), torch.randn(3, 96, generator=generator).half()
    quantized = _quantize(GGML(type="q5_0"), a=a, b=b)
    assert quantized["model.layers.0.a"].shape == (5, 64)
    assert quantized["model.layers.0.b"].type_name == "Q5_0"
    assert torch.equal(quantized["model.layers.0.b"].data, encode(b, "Q5_0"))
    error = quantized["model.layers.0.a"].dequantize() - a.float()
    assert error.abs().max() < a.abs().max() / 16


def test_float_types_are_exact() -> None:
    weight = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)).half()
    assert torch.equal(_quantize(GGML(type="f16"), a=weight)["model.layers.0.a"].dequantize(), weight.float())


@pytest.mark.parametrize(
    ("type_name", "bits"),
    [("f16", 16), ("bf16", 16), ("q8_0", 8.5), ("q4_0", 4.5), ("q4_1", 5), ("q5_0", 5.5), ("q5_1", 6)],
)
def test_predicted_bits_are_those_of_the_bytes(type_name: str, bits: float) -> None:
    method = GGML(type=type_name)  # type: ignore[arg-type]
    assert method.predicted_bits(10, 64) == bits
    data = _quantize(method, a=torch.ones(10, 64))["model.layers.0.a"].data
    assert data.numel() * 8 / 640 == bits


def test_misfit_names_the_block_and_the_columns() -> None:
    assert GGML(type="q4_0").misfit(10, 48) == "type q4_0: its block of 32 does not divide in_features 48"
    assert GGML(type="q4_0").misfit(7, 96) is None
    assert GGML(type="f16").misfit(7, 5) is None
    assert GGML(type="bf16").misfit(7, 5) is None


def test_label_and_settings() -> None:
    assert GGML(type="q4_0").label() == "gguf Q4_0"
    with pytest.raises(ValidationError):
        GGML(type="q4_9")  # type: ignore[arg-type]


def test_refuses_weights_that_are_not_finite_or_overflow() -> None:
    with pytest.raises(ModelError, match=r"layers\.0\.a\.weight: 1 of 64 values are NaN"):
        _quantize(GGML(type="q8_0"), a=torch.full((1, 64), 1.0).index_fill(1, torch.tensor([3]), float("nan")))
    with pytest.raises(ModelError, match=r"layers\.0\.a\.weight: values up to 1e\+05 overflow the float16"):
        _quantize(GGML(type="f16"), a=torch.full((1, 64), 1e5))
    assert _quantize(GGML(type="bf16"), a=torch.full((1, 64), 1e5))["model.layers.0.a"].dequantize().max() > 9e4
