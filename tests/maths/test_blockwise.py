"""NF4, its 8-bit scales and int8 rows against bitsandbytes itself, bit for bit, also where roundings decide."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.maths import blockwise
from quantkit.maths.blockwise import int8_rows, nested_codes, nf4_codebook, nf4_codes
from quantkit.tensors import row_bands

SHAPES = [(700, 576), (33, 192), (5, 30), (3, 5), (1, 64)]


def weight(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])) * 0.05
    if shape[0] > 3:
        made[2] = 0
        made[3, :4] = 1e-8  # subnormal in float16
        made[4, 0] = 1e4
    return made.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_nf4_equals_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype, block_size: int) -> None:
    from bitsandbytes.functional import quantize_4bit

    given = weight(shape, dtype)
    packed, absmax = nf4_codes(given, block_size)
    theirs, state = quantize_4bit(given, blocksize=block_size, quant_type="nf4")
    assert torch.equal(packed, theirs) and torch.equal(absmax, state.absmax)
    assert torch.equal(nf4_codebook(given.device), state.code)
    theirs, state = quantize_4bit(given, blocksize=block_size, compress_statistics=True, quant_type="nf4")
    codes, outer, codebook, offset = nested_codes(absmax, 256)
    assert torch.equal(codes, state.absmax) and torch.equal(outer, state.state2.absmax)
    assert torch.equal(codebook, state.state2.code) and torch.equal(offset, state.offset)


def test_values_on_the_bounds_between_codes_go_where_bitsandbytes_puts_them() -> None:
    from bitsandbytes.functional import quantize_4bit

    codebook = nf4_codebook(torch.device("cpu"))
    bounds = (codebook[:-1] + codebook[1:]) / 2
    around = torch.cat([bounds, bounds.nextafter(torch.tensor(-2.0)), bounds.nextafter(torch.tensor(2.0))])
    given = torch.zeros(1, 64)
    given[0, :45], given[0, 63] = around, 1.0
    for scale in (1.0, 0.37, 1e-3, 1e4):
        packed, _ = nf4_codes(given * scale, 64)
        assert torch.equal(packed, quantize_4bit(given * scale, blocksize=64, quant_type="nf4")[0])


@pytest.mark.parametrize("kind", ["uniform", "normal", "equal", "tiny", "one"])
def test_codes_of_scales_equal_bitsandbytes(kind: str) -> None:
    from bitsandbytes.functional import quantize_blockwise

    generator = torch.Generator().manual_seed(0)
    scales = {
        "uniform": torch.rand(100_001, generator=generator),
        "normal": torch.randn(100_000, generator=generator).abs(),
        "equal": torch.full((512,), 0.5),
        "tiny": torch.rand(300, generator=generator) * 1e-39,  # its inverse is infinite
        "one": torch.ones(1),
    }[kind]
    theirs, state = quantize_blockwise(scales - scales.mean(), blocksize=256)
    codes, outer, codebook, _ = nested_codes(scales, 256)
    assert torch.equal(codes, theirs) and torch.equal(outer, state.absmax) and torch.equal(codebook, state.code)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_equals_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from bitsandbytes.functional import int8_vectorwise_quant

    given = weight(shape, dtype)
    codes, absmax = int8_rows(given)
    theirs, scale, _ = int8_vectorwise_quant(given.half())
    assert torch.equal(codes, theirs) and torch.equal(absmax, scale)
    assert torch.equal(codes[absmax == 0], torch.zeros_like(codes[absmax == 0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_compiled_rows_equal_those_by_tensors(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that a GPU takes, which bitsandbytes' processor kernel stands for too."""
    given = weight((700, 576), dtype)
    compiled = int8_rows(given)
    monkeypatch.setattr(blockwise, "_compiled_rows", blockwise._rows_by_tensors)
    assert all(torch.equal(a, b) for a, b in zip(compiled, int8_rows(given), strict=True))


def test_bands_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    given = weight((700, 576), torch.bfloat16)
    whole = (*nf4_codes(given, 64), *int8_rows(given))
    monkeypatch.setattr("quantkit.tensors.BAND", 1 << 13)
    assert len(list(row_bands(given))) == 50
    assert all(torch.equal(a, b) for a, b in zip(whole, (*nf4_codes(given, 64), *int8_rows(given)), strict=True))


def test_comparisons_give_what_a_binary_search_gives() -> None:
    """The first run on a CPU, the second on other devices."""
    values = torch.linspace(-1, 1, 4001)
    codebook = nf4_codebook(values.device)
    searched = torch.bucketize(values, (codebook[:-1] + codebook[1:]) / 2, out_int32=True).to(torch.uint8)
    assert torch.equal(blockwise._nearest_nf4(values), searched)


def test_values_that_are_not_finite_reach_the_absmax() -> None:
    for bad in (float("nan"), float("inf")):
        given = torch.ones(4, 64)
        given[1, 3] = bad
        assert nf4_codes(given, 64)[1].isfinite().tolist() == [True, False, True, True]
        assert int8_rows(given)[1].isfinite().tolist() == [True, False, True, True]
