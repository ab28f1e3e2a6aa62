"""AWQ and GPTQ on a block: folding changes no function, statistics are used right, odd cases are told."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.maths.gram import GramAccumulator, InputStatistics
from quantkit.methods.awq import AWQ
from quantkit.methods.base import BlockResult, BlockWeights
from quantkit.methods.gptq import GPTQ
from quantkit.methods.rtn import RTN
from quantkit.model.blocks import ARCHITECTURES, Block, LinearGroup
from quantkit.tensors import GroupTensor

HIDDEN, HEAD, HEADS, KV_HEADS, INNER = 32, 8, 4, 2, 64
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def _block() -> Block:
    groups = ARCHITECTURES["LlamaForCausalLM"].groups
    tensors = [f"{name}.weight" for name in SHAPES] + ["self_attn.v_proj.bias"]
    tensors += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    return Block(0, "", tuple(SHAPES), groups, tuple(tensors))


def _weights(seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, InputStatistics]]:
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(*shape, generator=generator) for name, shape in SHAPES.items()}
    others = {
        "input_layernorm.weight": torch.rand(HIDDEN, generator=generator) + 0.5,
        "post_attention_layernorm.weight": torch.rand(HIDDEN, generator=generator) + 0.5,
        "self_attn.v_proj.bias": torch.randn(KV_HEADS * HEAD, generator=generator),
    }
    statistics: dict[str, InputStatistics] = {}
    for group in _block().groups:
        size = SHAPES[group.linears[0]][1]
        seen = GramAccumulator(size, torch.device("cpu"))
        mix = torch.randn(size, size, generator=generator)  # channels that are correlated: what compensation lives on
        seen.add(torch.randn(500, size // 2, generator=generator) @ mix[: size // 2] * torch.logspace(-1, 1, size))
        statistics.update(dict.fromkeys(group.linears, seen.result()))
    return weights, others, statistics


def _attention_and_mlp(weights: dict[str, Tensor], others: dict[str, Tensor], inputs: Tensor) -> Tensor:
    """A block without attention mixing: enough to see whether scales that were folded cancel."""
    x = inputs * others["input_layernorm.weight"]
    v = x @ weights["self_attn.v_proj"].T + others["self_attn.v_proj.bias"]
    v = v.view(-1, KV_HEADS, 1, HEAD).expand(-1, KV_HEADS, HEADS // KV_HEADS, HEAD).reshape(len(inputs), -1)
    mixed = v @ weights["self_attn.o_proj"].T + x @ weights["self_attn.q_proj"].T
    mixed = mixed + (x @ weights["self_attn.k_proj"].T).repeat(1, HEADS // KV_HEADS)
    y = mixed * others["post_attention_layernorm.weight"]
    inner = torch.relu(y @ weights["mlp.gate_proj"].T) * (y @ weights["mlp.up_proj"].T)
    return inner @ weights["mlp.down_proj"].T


def _run(method: AWQ | GPTQ | RTN, weights: dict[str, Tensor], others: dict[str, Tensor], statistics) -> BlockResult:  # type: ignore[no-untyped-def]
    return method.quantize_block(BlockWeights(_block(), weights, others, head_dim=HEAD), dict(statistics))


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_folding_alone_changes_no_function(rounding: str, pruned: bool) -> None:
    weights, others, statistics = _weights()
    if pruned:
        weights["self_attn.o_proj"][:, :HEAD] = 0  # a head without weights shares its values with one that has some
    given = BlockWeights(_block(), weights, others, head_dim=HEAD)
    method = AWQ(group_size=16, rounding=rounding)  # type: ignore[arg-type]
    work = method.begin(given)
    work.fold(statistics)
    folded = {name: weight.double() for name, weight in work.weights.items()}
    result = method.quantize_block(given, dict(statistics))
    assert set(result.quantized) == set(SHAPES) == set(folded)
    assert "input_layernorm.weight" in result.replaced and "self_attn.v_proj.bias" in result.replaced
    others_now = {name: result.replaced.get(name, tensor).double() for name, tensor in others.items()}
    inputs = torch.randn(20, HIDDEN, dtype=torch.float64)
    before = _attention_and_mlp(
        {k: w.double() for k, w in weights.items()}, {k: t.double() for k, t in others.items()}, inputs
    )
    after = _attention_and_mlp(folded, others_now, inputs)
    assert torch.allclose(before, after, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    assert any("scale^0." in text for text in result.applied.values()), "the case must be one where a scale pays"


def test_norm_offset_is_part_of_the_gain() -> None:
    weights, others, statistics = _weights()
    given = BlockWeights(_block(), weights, others, norm_offset=1.0, head_dim=HEAD)
    work = AWQ(group_size=16).begin(given)
    work.fold(statistics)
    gain = work.replaced["input_layernorm.weight"] + 1.0
    scale = work.weights["self_attn.q_proj"] / weights["self_attn.q_proj"]
    assert torch.allclose(gain * scale[0], others["input_layernorm.weight"] + 1.0, rtol=1e-4)


@pytest.mark.parametrize("exponents", [0, 4])
def test_codes_are_held_beside_what_they_were_made_of_and_that_is_let_go(exponents: int) -> None:
    weights, others, statistics = _weights()
    weights = {name: weight.bfloat16() for name, weight in weights.items()}  # so that float32 copies are the work's own
    work = GPTQ(group_size=16, exponents=exponents).begin(BlockWeights(_block(), weights, others, head_dim=HEAD))
    work.fold(statistics)
    wanted = {name: weight.clone() for name, weight in work.weights.items()}
    for group in _block().groups:
        first = group.linears[0]
        work.round(group, work.behind_scale(first, statistics[first].gram))
        assert not set(group.linears) & set(work.weights)
    result = work.result()
    for name, weight in wanted.items():
        decoded = result.quantized[name].dequantize().double()
        lost = float((weight.double() - decoded).square().sum())
        assert result.sqnr_db[name] == pytest.approx(
            10 * math.log10(float(weight.double().square().sum()) / lost), 1e-6
        )
        assert not exponents or not torch.equal(weight, weights[name].float()), "scales must have changed it"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_weights_come_in_the_dtype_that_they_run_in(dtype: torch.dtype) -> None:
    weights, others, statistics = _weights()
    work = GPTQ(group_size=16, exponents=0).begin(BlockWeights(_block(), weights, others, head_dim=HEAD))
    group = _block().groups[0]
    found = work.round(group, statistics[group.linears[0]].gram, dtype=dtype)
    for name in group.linears:
        made = found[name]
        assert isinstance(made, Tensor) and made.dtype == dtype
        assert torch.equal(made, work.result().quantized[name].dequantize().to(dtype))


def _loss(result: BlockResult, weights: dict[str, Tensor], statistics: dict[str, InputStatistics], name: str) -> float:
    error = (result.quantized[name].dequantize() - weights[name]).double()
    return float(((error @ statistics[name].gram.double()) * error).sum())


@pytest.mark.parametrize("symmetric", [True, False])
def test_compensation_lowers_the_loss_on_its_inputs(symmetric: bool) -> None:
    weights, others, statistics = _weights(3)
    nearest = _run(RTN(group_size=16, symmetric=symmetric), weights, others, statistics)
    plain = _run(
        GPTQ(group_size=16, symmetric=symmetric, search_range=False, exponents=0, refine=0), weights, others, statistics
    )
    searched = _run(GPTQ(group_size=16, symmetric=symmetric, exponents=0), weights, others, statistics)
    for name in ("mlp.gate_proj", "mlp.down_proj"):
        losses = [_loss(result, weights, statistics, name) for result in (nearest, plain, searched)]
        assert losses[1] < 0.3 * losses[0] and losses[2] < 0.3 * losses[0], losses


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_balanced_scales_lose_the_same_whatever_channels_were_scaled_by(rounding: str) -> None:
    weights, others, statistics = _weights(3)
    generator = torch.Generator().manual_seed(8)
    before = torch.exp(1.5 * torch.randn(HIDDEN, generator=generator))
    moved = weights | {name: weights[name] / before for name in ("mlp.gate_proj", "mlp.up_proj")}
    accumulator = GramAccumulator(HIDDEN, torch.device("cpu"))
    accumulator.add(torch.randn(500, HIDDEN, generator=generator) * torch.logspace(-1, 1, HIDDEN))
    seen = accumulator.result()
    other = InputStatistics(seen.gram * before[:, None] * before, seen.mean_abs * before, seen.tokens)
    gain = {"post_attention_layernorm.weight": others["post_attention_layernorm.weight"] * before}

    def lost(
        scales: str, exponents: int, weights: dict[str, Tensor], others: dict[str, Tensor], seen: InputStatistics
    ) -> float:
        method = AWQ(group_size=16, rounding=rounding, scales=scales, exponents=exponents)  # type: ignore[arg-type]
        result = _run(method, weights, others, statistics | dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), seen))
        scale = others["post_attention_layernorm.weight"] / result.replaced["post_attention_layernorm.weight"]
        error = (result.quantized["mlp.gate_proj"].dequantize() / scale - weights["mlp.gate_proj"]).double()
        return float(((error @ seen.gram.double()) * error).sum())

    # whole scales or none: powers between them are not the same
    here, there = lost("balanced", 1, weights, others, seen), lost("balanced", 1, moved, others | gain, other)
    if rounding == "nearest":
        assert there == pytest.approx(here, rel=0.02)
    assert there < 0.8 * lost("inputs", 20, moved, others | gain, other)


def test_linears_of_one_input_are_rounded_as_if_alone() -> None:
    weights, others, statistics = _weights()
    together = _run(GPTQ(group_size=16, exponents=0), weights, others, statistics).quantized["self_attn.k_proj"]
    alone = _run(GPTQ(group_size=16), {"self_attn.k_proj": weights["self_attn.k_proj"]}, others, statistics)
    single = alone.quantized["self_attn.k_proj"]
    assert isinstance(together, GroupTensor) and isinstance(single, GroupTensor)
    assert torch.equal(together.codes, single.codes) and torch.equal(together.scale, single.scale)


def test_a_group_under_mixed_settings_is_not_scaled_and_says_why() -> None:
    weights, others, statistics = _weights()
    held_back = {name: weight for name, weight in weights.items() if name != "mlp.up_proj"}
    others["mlp.up_proj.weight"] = weights["mlp.up_proj"]
    result = _run(AWQ(group_size=16), held_back, others, statistics)
    assert "mlp.up_proj read the same input" in result.notes["mlp.gate_proj"]
    assert "mlp.up_proj is not quantized by this method" in result.notes["mlp.down_proj"]
    assert "post_attention_layernorm.weight" not in result.replaced
    assert "input_layernorm.weight" in result.replaced


def test_raised_damping_is_noted() -> None:
    weights, others, statistics = _weights()
    inputs = torch.randn(500, INNER, generator=torch.Generator().manual_seed(0))
    values, vectors = torch.linalg.eigh(inputs.T @ inputs)
    values[0] = -0.03 * values.mean()
    indefinite = vectors @ torch.diag(values) @ vectors.T
    statistics["mlp.down_proj"] = InputStatistics(indefinite, inputs.abs().mean(dim=0), 500)
    group = LinearGroup(("mlp.down_proj",))
    block = Block(0, "", ("mlp.down_proj",), (group,), ())
    given = BlockWeights(block, {"mlp.down_proj": weights["mlp.down_proj"]})
    result = GPTQ(group_size=16, exponents=0, act_order=False).quantize_block(given, dict(statistics))
    assert "damping raised from 0.01 to 0.1" in result.notes["mlp.down_proj"]


def test_values_that_are_not_finite_name_the_tensor() -> None:
    weights, others, statistics = _weights()
    weights["mlp.gate_proj"][3, 4] = float("nan")
    with pytest.raises(ModelError, match=r"mlp\.gate_proj\.weight: 1 of 2048"):
        _run(GPTQ(group_size=16), weights, others, statistics)
    weights, others, statistics = _weights()
    statistics["self_attn.o_proj"].gram[0, 0] = float("inf")
    with pytest.raises(ModelError, match=r"inputs of self_attn\.o_proj"):
        _run(GPTQ(group_size=16), weights, others, statistics)
