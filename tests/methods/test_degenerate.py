"""Inputs and weights at the edge: what a method makes of them is finite and no worse than rounding to nearest, or is an
error that names the tensor; a fall-back is in the record."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.maths.gram import GramAccumulator, InputStatistics
from quantkit.methods.awq import AWQ
from quantkit.methods.base import BlockResult, BlockWeights, Method
from quantkit.methods.ggml import GGML
from quantkit.methods.gptq import GPTQ
from quantkit.methods.int8 import INT8
from quantkit.methods.nf4 import NF4
from quantkit.methods.rtn import RTN
from quantkit.model.blocks import ARCHITECTURES, Block, LinearGroup
from quantkit.tensors import GroupTensor

HIDDEN, HEAD, HEADS, KV_HEADS, INNER, GROUP = 64, 16, 4, 2, 128, 32
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
NORM = "input_layernorm.weight"
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

CALIBRATED: dict[str, AWQ | GPTQ] = {
    "awq nearest": AWQ(group_size=GROUP, rounding="nearest"),
    "awq as in its paper": AWQ(group_size=GROUP, rounding="nearest", scales="inputs", exponents=20),
    "awq gptq": AWQ(group_size=GROUP, rounding="gptq"),
    "gptq": GPTQ(group_size=GROUP, exponents=0),
    "gptq scales": GPTQ(group_size=GROUP, exponents=20),
    "gptq asymmetric": GPTQ(group_size=GROUP, exponents=0, symmetric=False),
    "gptq 8-bit row": GPTQ(bits=8, group_size=None, exponents=0),
}
UNCALIBRATED: dict[str, Method] = {
    "rtn": RTN(group_size=GROUP),
    "rtn symmetric": RTN(group_size=GROUP, symmetric=True),
    "int8": INT8(),
    "nf4": NF4(double_quant=False, block_size=32),
    "nf4 double": NF4(block_size=32),
    "q8_0": GGML(type="q8_0"),
    "q4_0": GGML(type="q4_0"),
    "q4_1": GGML(type="q4_1"),
    "q5_0": GGML(type="q5_0"),
    "q5_1": GGML(type="q5_1"),
    "f16": GGML(type="f16"),
    "bf16": GGML(type="bf16"),
}
METHODS: dict[str, Method] = {**CALIBRATED, **UNCALIBRATED}

INPUTS = ["plain", "dead columns", "all dead", "one token", "rank 5", "outliers of 1e4", "tiny", "one constant channel"]
WEIGHTS = ["plain", "zero rows", "all zero", "outlier column of 1e4", "tiny 1e-8", "one value", "constant"]


def make_inputs(kind: str, size: int, generator: torch.Generator) -> Tensor:
    """Calibration inputs [tokens, size] with correlated channels."""
    mix = torch.eye(size) + 0.2 * torch.randn(size, size, generator=generator)
    tokens = {"one token": 1, "rank 5": 5}.get(kind, 300)
    inputs = torch.randn(tokens, size, generator=generator) @ mix
    if kind == "dead columns":
        inputs[:, [0, 3, size - 1]] = 0
    elif kind == "all dead":
        inputs[:] = 0
    elif kind == "outliers of 1e4":
        inputs[:, [1, size // 2]] *= 1e4
    elif kind == "tiny":
        inputs *= 1e-8
    elif kind == "one constant channel":
        inputs[:, 2] = 3.0
        inputs[:, 3:] *= 1e-3
    return inputs


def make_weight(kind: str, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    weight = torch.randn(shape, generator=generator) * 0.05
    if kind == "zero rows":
        weight[[0, 5]] = 0
        weight[1, : shape[1] // 2] = 0
    elif kind == "all zero":
        weight[:] = 0
    elif kind == "outlier column of 1e4":
        weight[:, 7] *= 1e4
    elif kind == "tiny 1e-8":
        weight *= 2e-7
    elif kind == "one value":
        weight[:] = 0
        weight[3, 4] = 1.0
    elif kind == "constant":
        weight[:] = 0.7
    return weight


def gather(inputs: Tensor) -> InputStatistics:
    accumulator = GramAccumulator(inputs.shape[1], inputs.device)
    accumulator.add(inputs)
    return accumulator.result()


def make_block(inputs_kind: str, weights_kind: str, *names: str) -> tuple[BlockWeights, dict[str, InputStatistics]]:
    """A Llama block, or the linears of it that are named and the groups they form, and the statistics of its inputs."""
    generator = torch.Generator().manual_seed(7)
    shapes = {name: shape for name, shape in SHAPES.items() if not names or name in names}
    weights = {name: make_weight(weights_kind, shape, generator) for name, shape in shapes.items()}
    others = {
        NORM: torch.rand(HIDDEN, generator=generator) + 0.5,
        "post_attention_layernorm.weight": torch.rand(HIDDEN, generator=generator) + 0.5,
    }
    groups = tuple(group for group in ARCHITECTURES["LlamaForCausalLM"].groups if set(group.linears) <= set(shapes))
    statistics: dict[str, InputStatistics] = {}
    for group in groups:
        seen = gather(make_inputs(inputs_kind, shapes[group.linears[0]][1], generator))
        statistics.update(dict.fromkeys(group.linears, seen))
    block = Block(0, "", tuple(shapes), groups, (*(f"{name}.weight" for name in shapes), *others))
    return BlockWeights(block, weights, others, head_dim=HEAD), statistics


def check_tensors(result: BlockResult, given: BlockWeights) -> None:
    """Everything that would be written is finite, and scales are what float16 gives back."""
    assert set(result.quantized) == set(given.weights) == set(result.applied)
    for name, tensor in result.quantized.items():
        decoded = tensor.dequantize()
        assert decoded.shape == given.weights[name].shape and bool(torch.isfinite(decoded).all()), name
        if isinstance(tensor, GroupTensor):
            assert torch.equal(tensor.scale, tensor.scale.half().float()) and bool((tensor.scale != 0).all()), name
            assert bool(torch.isfinite(tensor.scale).all()) and int(tensor.codes.max()) < tensor.grid.levels, name
    for name, tensor in result.replaced.items():
        assert bool(torch.isfinite(tensor.half()).all()), f"{name} does not fit float16"


def loss(error: Tensor, gram: Tensor) -> float:
    wide = error.double()
    return float(((wide @ gram.double()) * wide).sum())


@pytest.mark.parametrize("weights_kind", WEIGHTS)
@pytest.mark.parametrize("inputs_kind", INPUTS)
@pytest.mark.parametrize("name", CALIBRATED)
def test_a_block_comes_out_finite(name: str, inputs_kind: str, weights_kind: str) -> None:
    given, statistics = make_block(inputs_kind, weights_kind)
    check_tensors(METHODS[name].quantize_block(given, dict(statistics)), given)


@pytest.mark.parametrize("weights_kind", WEIGHTS)
@pytest.mark.parametrize("name", UNCALIBRATED)
def test_weights_come_out_finite_without_calibration(name: str, weights_kind: str) -> None:
    given, _ = make_block("plain", weights_kind)
    check_tensors(METHODS[name].quantize_block(given, {}), given)


@pytest.mark.parametrize("weights_kind", WEIGHTS)
@pytest.mark.parametrize("inputs_kind", INPUTS)
@pytest.mark.parametrize("name", CALIBRATED)
def test_the_loss_is_at_most_that_of_rounding_to_nearest(name: str, inputs_kind: str, weights_kind: str) -> None:
    """On the Gram of the calibration, in the units of the unscaled weights; linears of one input together."""
    method = CALIBRATED[name]
    given, statistics = make_block(inputs_kind, weights_kind, *QKV)
    result = method.quantize_block(given, dict(statistics))
    nearest = RTN(bits=method.bits, group_size=method.group_size, symmetric=method.grid.symmetric)
    plain = nearest.quantize_block(given, {})
    scale = given.others[NORM] / result.replaced[NORM] if NORM in result.replaced else torch.ones(HIDDEN)
    ours = theirs = whole = 0.0
    for linear in QKV:
        weight, gram = given.weights[linear], statistics[linear].gram
        ours += loss(result.quantized[linear].dequantize() / scale - weight, gram)
        theirs += loss(plain.quantized[linear].dequantize() - weight, gram)
        whole += loss(weight, gram)
    slack = 1.01 if method.steps.compensate is False else 1.001  # the range search looks at each group alone
    assert ours <= theirs * slack + 1e-9 * whole, f"{ours:.4g} against {theirs:.4g} of {whole:.4g}"


@pytest.mark.parametrize("name", CALIBRATED)
def test_dead_columns_are_told(name: str) -> None:
    given, statistics = make_block("dead columns", "plain", *QKV)
    applied = METHODS[name].quantize_block(given, dict(statistics)).applied
    compensated = CALIBRATED[name].steps.compensate
    assert all(("3 dead columns" in text) == compensated for text in applied.values()), applied


def test_weights_of_dead_columns_are_rounded_to_nearest() -> None:
    given, statistics = make_block("dead columns", "plain", *QKV)
    tensor = GPTQ(group_size=GROUP, exponents=0).quantize_block(given, dict(statistics)).quantized["self_attn.q_proj"]
    assert isinstance(tensor, GroupTensor)
    error = (tensor.dequantize() - given.weights["self_attn.q_proj"]).abs()
    scale = tensor.scale.abs()[:, tensor.column_groups()]
    inside = (tensor.codes > 0) & (tensor.codes < tensor.grid.levels - 1)  # others are cut off by the searched range
    for column in (0, 3, HIDDEN - 1):
        # 0.5 when it was rounded; the group's scale was refit to the live columns since
        assert bool((error <= scale * 0.6)[inside[:, column], column].all())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_not_finite_is_named(name: str, bad: float, dtype: torch.dtype) -> None:
    given, statistics = make_block("plain", "plain")
    given.weights["mlp.up_proj"][3, 4] = bad
    weights = {linear: weight.to(dtype) for linear, weight in given.weights.items()}
    with pytest.raises(ModelError, match=r"mlp\.up_proj\.weight: 1 of 8192 values are NaN or infinite"):
        METHODS[name].quantize_block(BlockWeights(given.block, weights, given.others, head_dim=HEAD), dict(statistics))


@pytest.mark.parametrize("name", CALIBRATED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e25])
def test_inputs_that_are_not_finite_name_the_linears_that_read_them(name: str, bad: float) -> None:
    """1e25 is finite, its square is not."""
    given, statistics = make_block("plain", "plain")
    inputs = torch.randn(50, INNER)
    inputs[3, 5] = bad
    statistics["mlp.down_proj"] = gather(inputs)
    with pytest.raises(ModelError, match=r"inputs of mlp\.down_proj: .* NaN or infinite"):
        METHODS[name].quantize_block(given, dict(statistics))


def test_of_inputs_that_are_not_finite_the_first_that_run_are_named() -> None:
    """What is wrong there is wrong in all that come after, of which the widest is rounded first."""
    given, statistics = make_block("plain", "plain")
    for group in given.block.groups:
        seen = gather(torch.full((50, SHAPES[group.linears[0]][1]), float("nan")))
        statistics.update(dict.fromkeys(group.linears, seen))
    with pytest.raises(ModelError, match=r"^inputs of self_attn\.q_proj, self_attn\.k_proj, self_attn\.v_proj: "):
        GPTQ(group_size=GROUP, exponents=0).quantize_block(given, statistics)


@pytest.mark.parametrize("name", ["awq nearest", "awq gptq", "gptq scales"])
def test_a_norm_that_is_not_finite_is_named(name: str) -> None:
    given, statistics = make_block("plain", "plain")
    given.others[NORM][2] = float("nan")
    with pytest.raises(ModelError, match=r"input_layernorm\.weight: 1 of 64"):
        METHODS[name].quantize_block(given, dict(statistics))


@pytest.mark.parametrize(
    ("name", "size"),
    [(name, size) for name in METHODS for size in (1e4, 3e5, 1e7)],
)
def test_weights_beyond_the_range_of_float16_scales(name: str, size: float) -> None:
    """Decoded to within the coarsest step of the method, or refused by name: never cut off in silence."""
    given, statistics = make_block("plain", "plain", "mlp.down_proj")
    given.weights["mlp.down_proj"][:, 9] = size * torch.linspace(-1, 1, HIDDEN)
    try:
        result = METHODS[name].quantize_block(given, dict(statistics))
    except ModelError as error:
        assert "mlp.down_proj" in error.message and "float16" in error.message
        return
    check_tensors(result, given)
    decoded = result.quantized["mlp.down_proj"].dequantize()[:, 9]
    wanted = given.weights["mlp.down_proj"][:, 9]
    assert float((decoded - wanted).abs().max()) <= 0.2 * size  # half of a 2-bit step, or a range cut to 0.6


@pytest.mark.parametrize(
    ("name", "gain"),
    [(name, gain) for name in ("awq nearest", "awq gptq", "gptq scales") for gain in (1e-4, 1.0, 3e3, 6e4)],
)
def test_a_scale_that_would_drive_the_norm_out_of_float16(name: str, gain: float) -> None:
    """Channels that differ by 1e8 ask for scales that do: the norm keeps 10 bits, or the record says why not."""
    given, statistics = make_block("plain", "plain", *QKV)
    generator = torch.Generator().manual_seed(3)
    spread = torch.logspace(-4, 4, HIDDEN)[torch.randperm(HIDDEN, generator=generator)]
    seen = gather(torch.randn(300, HIDDEN, generator=generator) * spread)
    statistics.update(dict.fromkeys(QKV, seen))
    given.others[NORM].fill_(gain)
    result = METHODS[name].quantize_block(given, dict(statistics))
    check_tensors(result, given)
    if NORM in result.replaced:
        exact = result.replaced[NORM]
        assert float(((exact.half().float() - exact) / exact).abs().max()) <= 2**-10
    else:
        assert all("scale^0" in text for text in result.applied.values()) or result.notes


def test_a_near_singular_gram_is_noted() -> None:
    """A Gram whose smallest eigenvalue is below zero, as sums of half-precision products can leave it."""
    given, statistics = make_block("plain", "plain", "mlp.down_proj")
    values, vectors = torch.linalg.eigh(statistics["mlp.down_proj"].gram)
    values[0] = -0.03 * values.mean()
    gram = vectors @ torch.diag(values) @ vectors.T
    statistics["mlp.down_proj"] = InputStatistics(gram, statistics["mlp.down_proj"].mean_abs, 300)
    result = GPTQ(group_size=GROUP, exponents=0).quantize_block(given, dict(statistics))
    assert "damping raised from 0.01 to 0.1" in result.notes["mlp.down_proj"]


def test_a_scale_that_cannot_be_folded_is_noted() -> None:
    given, statistics = make_block("plain", "plain", "mlp.down_proj")
    result = AWQ(group_size=GROUP).quantize_block(given, dict(statistics))
    assert result.notes["mlp.down_proj"] == "no scale: mlp.up_proj is not quantized by this method"


def test_a_linear_without_statistics_of_its_group_is_not_lost() -> None:
    """A block with a single linear that nothing feeds: no scale, no note, rounded all the same."""
    given, statistics = make_block("plain", "plain", "mlp.down_proj")
    block = Block(0, "", ("mlp.down_proj",), (LinearGroup(("mlp.down_proj",)),), ())
    result = AWQ(group_size=GROUP).quantize_block(BlockWeights(block, given.weights), dict(statistics))
    assert set(result.quantized) == {"mlp.down_proj"} and not result.notes
