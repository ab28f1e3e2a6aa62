"""NF4 against the definition in float64 and, bit for bit, against bitsandbytes' own decoding."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.formats.bitsandbytes import pack_nf4
from quantkit.methods.base import BlockWeights
from quantkit.methods.nf4 import NF4, quantize_nf4
from quantkit.model.blocks import Block
from quantkit.tensors import CodebookBlocks

SHAPES = [(64, 64), (5, 128), (1, 64), (33, 192), (3, 1024)]


def random_weight(out_features: int, in_features: int) -> Tensor:
    generator = torch.Generator().manual_seed(out_features * 1000 + in_features)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.05
    weight *= torch.rand(out_features, 1, generator=generator) + 0.1  # rows of different size
    weight[-1, 0] = 3.0  # an outlier
    return weight


def decode_slowly(tensor: CodebookBlocks) -> Tensor:
    """The weight as the format describes it, value by value in float64."""
    count = tensor.out_features * tensor.in_features
    data = tensor.packed.reshape(-1).tolist()
    scale = tensor.absmax.double().tolist()
    if tensor.nested_absmax is not None:
        assert tensor.nested_codebook is not None and tensor.nested_offset is not None
        inner, outer = tensor.nested_codebook.double().tolist(), tensor.nested_absmax.double().tolist()
        scale = [inner[int(code)] * outer[block // 256] + tensor.nested_offset for block, code in enumerate(scale)]
    codebook = tensor.codebook.double().tolist()
    values = []
    for index in range(count):
        byte = data[index // 2]
        code = byte & 15 if index % 2 else byte >> 4
        values.append(codebook[code] * scale[index // tensor.block_size])
    return torch.tensor(values, dtype=torch.float64).reshape(tensor.shape)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_is_that_of_bitsandbytes_bit_for_bit(
    shape: tuple[int, int], dtype: torch.dtype, double_quant: bool
) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = random_weight(*shape).to(dtype)
    for block_size in (32, 64, 1024):
        if shape[1] % block_size:
            continue
        quantized = quantize_nf4(weight, block_size, double_quant)
        packed, state = quantize_4bit(weight, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4")
        assert torch.equal(quantized.packed, packed) and torch.equal(quantized.absmax, state.absmax)
        in_own_dtype = dequantize_4bit(packed, state).reshape(shape)
        assert torch.equal(quantized.dequantize().to(dtype), in_own_dtype)
        state.dtype = torch.float32
        in_full = dequantize_4bit(packed, state).reshape(shape)
        assert torch.equal(quantized.dequantize(), in_full)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    ("shape", "block_size"), [((6, 96), 64), ((5, 30), 64), ((3, 5), 32), ((9, 64), 128), ((5, 64), 64)]
)
def test_blocks_may_straddle_rows_when_decoded(shape: tuple[int, int], block_size: int, double_quant: bool) -> None:
    """Files of other tools may hold them; bitsandbytes itself decodes some of them wrongly on some processors."""
    quantized = quantize_nf4(random_weight(*shape), block_size, double_quant)
    slowly = decode_slowly(quantized)
    # a scale that is itself coded is a sum: its roundings are as large as those of its offset
    offset = quantized.nested_offset or 0.0
    assert bool(((quantized.dequantize() - slowly).abs() <= (slowly.abs() + offset) * 2**-22).all())


def test_codes_are_the_nearest_of_the_codebook() -> None:
    weight = random_weight(8, 128)
    quantized = quantize_nf4(weight, 64, double_quant=False)
    blocks = weight.double().reshape(-1, 64)
    absmax = blocks.abs().amax(dim=1)
    assert torch.equal(quantized.absmax.double(), absmax)
    distances = (blocks[:, :, None] / absmax[:, None, None] - quantized.codebook.double()).abs()
    best = distances.amin(dim=2)
    found = (quantized.dequantize().double().reshape(-1, 64) / absmax[:, None] - blocks / absmax[:, None]).abs()
    assert float((found - best).max()) < 1e-6


def test_a_block_of_zeros_and_the_ends_of_the_codebook() -> None:
    weight = random_weight(2, 128)
    weight[0] = 0
    decoded = quantize_nf4(weight, 64, double_quant=False).dequantize()
    assert torch.equal(decoded[0], torch.zeros(128))
    assert decoded[1, 0] == 3.0  # the largest of a block is exact


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(64, 64), (192, 576), (1536, 576)])
def test_predicted_bits_are_those_stored(shape: tuple[int, int], double_quant: bool, dtype: torch.dtype) -> None:
    method = NF4(double_quant=double_quant)
    quantized = quantize_nf4(random_weight(*shape), 64, double_quant)
    stored = pack_nf4("up.weight", quantized, dtype)
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert abs(method.predicted_bits(*shape) * shape[0] * shape[1] / 8 - size) < 1.5  # the dtype's name


def quantize(weight: Tensor, method: NF4) -> CodebookBlocks:
    given = BlockWeights(Block(0, "", ("up",), (), ()), {"up": weight})
    result = method.quantize_block(given, {})
    assert result.applied == {"up": method.label()}
    quantized = result.quantized["up"]
    assert isinstance(quantized, CodebookBlocks)
    return quantized


def test_the_settings_reach_the_kernel() -> None:
    weight = random_weight(4, 128).half()
    before = weight.clone()
    plain = quantize(weight, NF4(double_quant=False, block_size=128))
    assert (plain.block_size, plain.nested_absmax, plain.dtype) == (128, None, torch.float16)
    assert plain.absmax.shape == (4,) and plain.packed.shape == (4 * 64, 1)
    double = quantize(weight, NF4())
    assert (double.block_size, double.nested_block_size, double.absmax.dtype) == (64, 256, torch.uint8)
    assert torch.equal(weight, before)


def test_labels() -> None:
    assert NF4(double_quant=False).label() == "nf4"
    assert NF4().label() == "nf4 double-quant"
    assert NF4(block_size=128).label() == "nf4 g128 double-quant"


def test_rows_of_broken_blocks_are_refused() -> None:
    assert NF4().misfit(64, 576) is None
    assert "block_size 64 does not divide in_features 288; block_size 32 divides it" in (NF4().misfit(64, 288) or "")
    assert "block_size 32 divides" not in (NF4().misfit(64, 172) or "block_size 32 divides")
    assert NF4(block_size=32).misfit(64, 288) is None


def test_a_weight_that_is_not_finite_is_refused() -> None:
    weight = random_weight(4, 64)
    weight[1, 2] = float("nan")
    with pytest.raises(ModelError, match=r"up\.weight: 1 of 256 values"):
        quantize(weight, NF4())


@pytest.mark.parametrize("double_quant", [False, True])
def test_bitsandbytes_is_not_imported(double_quant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing it takes longer than quantizing a small model, and 100 MB."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert quantize(random_weight(4, 64), NF4(double_quant=double_quant)).shape == (4, 64)
