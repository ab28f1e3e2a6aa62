"""Groups become ggml blocks that decode to the very same weights, or a clear no."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from quantkit.errors import ModelError
from quantkit.maths.affine import quantize_nearest, search_grid
from quantkit.maths.ggml_codes import take
from quantkit.maths.ggml_export import holding_type, to_blocks
from quantkit.tensors import BlockTensor, Grid, GroupTensor


def exact_blocks(tensor: GroupTensor) -> BlockTensor:
    return to_blocks(tensor, holding_type(tensor))


def _tensor(bits: int, group_size: int | None, symmetric: bool, columns: int = 128) -> GroupTensor:
    weight = torch.randn(6, columns, generator=torch.Generator().manual_seed(0))
    return quantize_nearest(weight, Grid(bits, group_size, symmetric))


@pytest.mark.parametrize(
    ("bits", "symmetric", "type_name"),
    [
        (4, True, "Q4_0"),
        (3, True, "Q4_0"),
        (2, False, "Q4_0"),
        (3, False, "Q4_0"),
        (4, False, "Q5_0"),
        (8, True, "Q8_0"),
    ],
)
@pytest.mark.parametrize("group_size", [32, 64, 128, None])
def test_the_weights_are_the_same(bits: int, symmetric: bool, type_name: str, group_size: int | None) -> None:
    tensor = _tensor(bits, group_size, symmetric)
    blocks = exact_blocks(tensor)
    assert (blocks.type_name, blocks.shape) == (type_name, tensor.shape)
    decoded = gguf.dequantize(blocks.data.numpy(), gguf.GGMLQuantizationType[type_name])
    assert np.array_equal(decoded, tensor.dequantize().numpy())


def test_negative_scales_are_kept() -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    tensor = quantize_nearest(weight, Grid(4, 32, True))
    tensor = replace(tensor, scale=search_grid(weight, tensor.grid, None)[0])
    assert (tensor.scale < 0).any()
    assert torch.equal(exact_blocks(tensor).dequantize(), tensor.dequantize())


def test_minima_that_are_float16_numbers_fit_q4_1() -> None:
    tensor = _tensor(4, 32, False)
    tensor = replace(tensor, scale=torch.full_like(tensor.scale, 0.25))  # of few digits: so are its products
    blocks = exact_blocks(tensor)
    assert blocks.type_name == "Q4_1"
    assert torch.equal(blocks.dequantize(), tensor.dequantize())


@pytest.mark.parametrize("negative", [False, True])
def test_inexact_minima_keep_the_codes(negative: bool) -> None:
    tensor = _tensor(4, 32, False)
    if negative:
        tensor = replace(tensor, scale=-tensor.scale)
    assert tensor.zero is not None
    assert holding_type(tensor, exact=False) == "Q4_1"
    blocks = to_blocks(tensor, "Q4_1")
    error = (blocks.dequantize() - tensor.dequantize()).abs()
    minimum = (tensor.scale * tensor.zero).abs()
    assert 0 < float(error.max()) <= float(minimum.max()) * 2**-11  # half a unit in the last of eleven digits
    rounded = replace(tensor, scale=tensor.scale * 1.0001)
    assert holding_type(rounded, exact=False) == "Q4_1"
    assert torch.equal(take(to_blocks(rounded, "Q4_1").data, "Q4_1").codes, rounded.codes)


def test_scales_beyond_float16_are_refused_even_so() -> None:
    tensor = _tensor(4, 32, True)
    with pytest.raises(ModelError, match="out of float16's range"):
        holding_type(replace(tensor, scale=tensor.scale * 1e6), exact=False)


def test_groups_in_any_order_of_whole_blocks() -> None:
    tensor = _tensor(4, 32, True, columns=64)
    turned = replace(tensor, group_of=torch.tensor([1] * 32 + [0] * 32, dtype=torch.int32))
    assert torch.equal(exact_blocks(turned).dequantize(), turned.dequantize())


def test_what_no_type_holds_is_refused() -> None:
    with pytest.raises(ModelError, match="8 of 8 blocks of 32 columns lie in several groups"):
        exact_blocks(_tensor(4, 16, True, columns=256))
    with pytest.raises(ModelError, match="blocks of 32 columns do not divide rows of 48"):
        exact_blocks(_tensor(4, 16, True, columns=48))
    tensor = _tensor(4, 32, True)
    with pytest.raises(ModelError, match="24 of 24 scales are not float16 numbers"):
        exact_blocks(replace(tensor, scale=tensor.scale * 1.0001))
    wide = _tensor(8, 32, False)
    assert wide.zero is not None
    with pytest.raises(ModelError, match=r"codes lie 0 to 255 steps from their zero; Q8_0"):
        exact_blocks(
            replace(
                wide,
                zero=torch.zeros_like(wide.zero),
                codes=torch.arange(128)
                .repeat(6, 1)
                .mul(2)
                .clamp(max=255)
                .to(torch.uint8)
                .index_fill(1, torch.tensor([5]), 255),
            )
        )
