"""The K and IQ encoders, and the plain ones with importance, beside llama.cpp's own."""

from __future__ import annotations

import gguf
import numba
import numpy as np
import pytest
import torch
from torch import Tensor

from oracles import llama_cpp
from quantkit.errors import ModelError
from quantkit.maths.ggml import SEARCHED, WEIGHTED, block_layout, decode, encode, type_size
from quantkit.maths.ggml_bits import half_bits, half_value

LEAST_DB = {"Q2_K": 9, "Q3_K": 14, "IQ4_NL": 20, "IQ4_XS": 20, "Q4_K": 21, "Q5_K": 27, "Q6_K": 33}
"""Signal to noise that each type keeps of gaussian weights: a decibel below what was measured."""


def _cases() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator)

    outlier = normal(5, 512) * 0.02
    outlier[:, 7] = 1000.0
    zero_groups = normal(5, 768)
    zero_groups[:, 256:512] = zero_groups[:, 16:32] = zero_groups[:, 64:96] = 0.0
    mixed = normal(5, 512)
    mixed[:, :256] *= 1e-6
    mixed[:, 40:64] = 1e-9
    return {
        "normal": normal(17, 768) * 0.05,
        "one row": normal(1, 256),
        "many rows": normal(300, 256) * 0.02,
        "heavy tails": (normal(9, 1024) / normal(9, 1024)).clamp(-1e4, 1e4) * 0.02,
        "zero": torch.zeros(3, 512),
        "zero groups": zero_groups,
        "constant": torch.full((3, 512), 0.7),
        "negative constant": torch.full((3, 512), -0.7),
        "negative": -normal(5, 512).abs(),
        "positive": normal(5, 512).abs(),
        "outlier": outlier,
        "groups far apart": mixed,
        "ties in magnitude": torch.randint(-8, 9, (16, 512), generator=generator).float() / 8,
        "scale below float16": normal(5, 512) * 1e-7,
        "below the smallest that counts": normal(5, 512) * 1e-20,
        "subnormal": normal(5, 512) * 1e-40,
        "large": normal(5, 512) * 1e4,
    }


def _importance(columns: int) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(columns)
    drawn = torch.randn(columns, generator=generator) ** 2
    columns_off, blocks_off = drawn.clone(), drawn.clone()
    columns_off[::3] = 0.0
    blocks_off[:64] = blocks_off[-256:] = 0.0
    return {
        "none": None,
        "drawn": drawn,
        "columns of none": columns_off,
        "blocks of none": blocks_off,
        "no importance at all": torch.zeros(columns),
        "tiny": drawn * 1e-30,
    }


def _bytes(weight: Tensor, type_name: str, importance: Tensor | None) -> np.ndarray:
    number, row_bytes = int(gguf.GGMLQuantizationType[type_name]), type_size(type_name, weight.shape[1])
    return llama_cpp.quantize(
        weight.numpy(), number, row_bytes, None if importance is None else np.ascontiguousarray(importance.numpy())
    )


@pytest.mark.engine
@pytest.mark.parametrize("type_name", [*SEARCHED, *WEIGHTED, "Q8_0"])
def test_bytes_equal_llama_cpp(type_name: str) -> None:
    for case, weight in _cases().items():
        for kind, importance in _importance(weight.shape[1]).items():
            expected = _bytes(weight, type_name, importance)
            found = encode(weight, type_name, importance).numpy()
            np.testing.assert_array_equal(found, expected, err_msg=f"{case}, importance: {kind}")


@pytest.mark.parametrize("type_name", SEARCHED)
def test_values_equal_gguf_py(type_name: str) -> None:
    _, block_bytes = block_layout(type_name)
    generator = np.random.default_rng(1)
    data = generator.integers(0, 256, (33, 3 * block_bytes), dtype=np.uint8)  # every byte, float16 of any kind
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(data, gguf.GGMLQuantizationType[type_name])
    found = decode(torch.from_numpy(data), type_name, expected.shape).numpy()
    np.testing.assert_array_equal(found, expected)
    for weight in _cases().values():
        coded = encode(weight, type_name)
        values = gguf.dequantize(coded.numpy(), gguf.GGMLQuantizationType[type_name])
        np.testing.assert_array_equal(decode(coded, type_name, tuple(weight.shape)).numpy(), values)


@pytest.mark.parametrize(("type_name", "least_db"), LEAST_DB.items())
def test_error_is_what_the_bits_allow(type_name: str, least_db: float) -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(2))
    error = decode(encode(weight, type_name), type_name, (64, 512)) - weight
    assert 10 * torch.log10(weight.square().sum() / error.square().sum()) > least_db


@pytest.mark.parametrize("type_name", [*SEARCHED, *WEIGHTED])
def test_importance_lowers_the_error_where_it_counts(type_name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(64, 512, generator=generator)
    importance = torch.rand(512, generator=generator) ** 8

    def loss(data: Tensor) -> float:
        return float((importance * (decode(data, type_name, (64, 512)) - weight) ** 2).sum())

    assert loss(encode(weight, type_name, importance)) < 0.99 * loss(encode(weight, type_name))


def test_types_without_a_search_take_no_notice_of_importance() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(4))
    for type_name in ("Q8_0", "F16"):
        assert torch.equal(encode(weight, type_name, torch.rand(64)), encode(weight, type_name))


@pytest.mark.parametrize("type_name", ["Q3_K", "Q4_K", "IQ4_XS", "Q4_0"])
def test_the_bytes_do_not_depend_on_the_number_of_threads(type_name: str) -> None:
    weight = torch.randn(70, 768, generator=torch.Generator().manual_seed(5))
    importance = torch.rand(768, generator=torch.Generator().manual_seed(6))
    together = encode(weight, type_name, importance)
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        assert torch.equal(encode(weight, type_name, importance), together)
    finally:
        numba.set_num_threads(before)
    alone = torch.cat([encode(row, type_name, importance) for row in weight.split(1)])
    assert torch.equal(alone, together)


def test_bands_of_rows_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(10, 512, generator=torch.Generator().manual_seed(7))
    importance = torch.rand(512, generator=torch.Generator().manual_seed(8))
    whole = {name: encode(weight, name, importance) for name in (*SEARCHED, *WEIGHTED)}
    monkeypatch.setattr("quantkit.maths.ggml.COMPILED_BAND", 3 * 512)
    for name, data in whole.items():
        assert torch.equal(encode(weight, name, importance), data)


def test_no_rows_are_no_bytes() -> None:
    assert encode(torch.zeros(0, 256), "Q4_K").shape == (0, 144)


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ModelError, match="block of 256 does not divide a row of 64"):
        encode(torch.zeros(2, 64), "Q4_K")
    with pytest.raises(ModelError, match=r"values up to 1e\+30 overflow the float16 of ggml type Q4_K"):
        encode(torch.full((1, 256), 1e30), "Q4_K")
    assert block_layout("IQ4_XS") == (256, 136)


def test_float16_bits_are_those_of_numpy() -> None:
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    numbers = every[np.isfinite(every)].astype(np.float32)
    generator = np.random.default_rng(9)
    middles = (numbers[:-1] + numbers[1:]) / 2
    drawn = (generator.standard_normal(4096) * 10.0 ** generator.uniform(-9, 6, 4096)).astype(np.float32)
    extremes = np.array([np.inf, -np.inf, 0.0, -0.0, 65519.99, 65520.0, 2.0**-25, 2.0**-25 * 1.0001], np.float32)
    for value in np.concatenate((numbers, middles, drawn, extremes)):
        with np.errstate(over="ignore"):
            expected = np.float32(value).astype(np.float16)
        bits = half_bits(value)
        assert bits == int(expected.view(np.uint16)), value
        assert half_value(bits) == np.float32(expected)
    assert np.isnan(half_value(half_bits(np.float32(np.nan))))
