"""Rounding gptq on ggml's types: it loses less on its inputs than importance does, at the same bytes, and says so."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.maths.ggml import encode
from quantkit.maths.gram import GramAccumulator, InputStatistics
from quantkit.methods.base import BlockResult, BlockWeights
from quantkit.methods.ggml import GGML
from quantkit.model.blocks import Block, LinearGroup

LINEARS = ("up", "gate", "down")
BLOCK = Block(0, "", LINEARS, (LinearGroup(("up", "gate"), "norm", "norm"), LinearGroup(("down",), "up", "linear")), ())


def _given(columns: int = 64, inner: int = 96) -> tuple[dict[str, Tensor], dict[str, InputStatistics]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"up": (inner, columns), "gate": (inner, columns), "down": (columns, inner)}
    weights = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    statistics: dict[str, InputStatistics] = {}
    for group in BLOCK.groups:
        size = shapes[group.linears[0]][1]
        seen = GramAccumulator(size, torch.device("cpu"))
        mix = torch.randn(size // 2, size, generator=generator)  # correlated: what compensation lives on
        seen.add(torch.randn(800, size // 2, generator=generator) @ mix * torch.logspace(-0.5, 0.5, size))
        statistics.update(dict.fromkeys(group.linears, seen.result()))
    return weights, statistics


def _loss(result: BlockResult, weights: dict[str, Tensor], statistics: dict[str, InputStatistics], name: str) -> float:
    error = (result.quantized[name].dequantize() - weights[name]).double()
    return float(((error @ statistics[name].gram.double()) * error).sum())


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "q4_k_m", "q2_k"])
def test_it_loses_less_than_importance_at_the_same_bytes(kind: str) -> None:
    weights, statistics = _given()
    given = BlockWeights(BLOCK, weights)
    weighed = GGML(type=kind, importance=True).quantize_block(given, dict(statistics))  # type: ignore[arg-type]
    found = GGML(type=kind, rounding="gptq").quantize_block(given, dict(statistics))  # type: ignore[arg-type]
    for name in LINEARS:
        assert found.quantized[name].type_name == weighed.quantized[name].type_name  # type: ignore[union-attr]
        assert found.quantized[name].data.shape == weighed.quantized[name].data.shape  # type: ignore[union-attr]
        assert _loss(found, weights, statistics, name) < 0.7 * _loss(weighed, weights, statistics, name)


def test_what_was_done_is_told() -> None:
    weights, statistics = _given()
    result = GGML(type="q4_k_m", rounding="gptq").quantize_block(BlockWeights(BLOCK, weights), dict(statistics))
    assert dict(result.applied) == dict.fromkeys(LINEARS, "gguf Q5_0 gptq")
    assert result.notes["up"] == "Q4_K has blocks of 256, which do not divide its 64 columns"
    assert GGML(type="q4_k_m", rounding="gptq").label() == "gguf Q4_K_M gptq"


def test_scales_are_folded_when_asked() -> None:
    weights, statistics = _given()
    given = BlockWeights(BLOCK, weights, {"norm.weight": torch.ones(64)})
    method = GGML(type="q4_0", rounding="gptq", exponents=20)
    work = method.begin(given)
    assert work is not None
    work.fold(statistics)
    folded = work.weights["gate"]
    result = method.quantize_block(given, dict(statistics))
    assert any("scale^0." in text for text in result.applied.values()), "the case must be one where a scale pays"
    gain = result.replaced["norm.weight"]
    # up also feeds down, whose scale divides its rows: the folded gain shows in gate alone
    assert torch.allclose(folded * gain, weights["gate"], rtol=1e-4, atol=1e-6)


def test_the_head_has_no_statistics_and_is_rounded_to_nearest() -> None:
    head = Block(-1, "", ("lm_head",), (LinearGroup(("lm_head",)),), ())
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    result = GGML(type="q4_0", rounding="gptq").quantize_block(BlockWeights(head, {"lm_head": weight}), {})
    assert torch.equal(result.quantized["lm_head"].data, encode(weight, "Q4_0"))  # type: ignore[union-attr]
    assert result.applied["lm_head"] == "gguf Q4_0"


def test_mistakes_are_named() -> None:
    with pytest.raises(ValidationError, match="found gptq, expected nearest: type f16 is not quantized"):
        GGML(type="f16", rounding="gptq")
    with pytest.raises(ValidationError, match="found True, expected false: rounding gptq weighs by its own"):
        GGML(type="q4_0", rounding="gptq", importance=True)
    with pytest.raises(ValidationError, match="q2_k_s without importance"):
        GGML(type="q2_k_s")
    assert GGML(type="q2_k_s", rounding="gptq").calibrated
    weights, statistics = _given()
    weights["up"][0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"up\.weight: 1 of 6144 values are NaN"):
        GGML(type="q4_0", rounding="gptq").quantize_block(BlockWeights(BLOCK, weights), dict(statistics))
    weights, statistics = _given()
    weights["gate"][0, 0] = 1e7
    with pytest.raises(ModelError, match=r"up, gate: values up to 1e\+07 overflow the float16"):
        GGML(type="q4_0", rounding="gptq").quantize_block(BlockWeights(BLOCK, weights), dict(statistics))
