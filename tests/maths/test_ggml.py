from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from oracles import llama_cpp
from quantkit.errors import ModelError
from quantkit.maths.ggml import CODECS, block_layout, decode, encode, type_size


def _cases() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator)

    def whole(rows: int, columns: int) -> Tensor:
        return torch.randint(-127, 128, (rows, columns), generator=generator).float()

    outliers = (torch.rand(33, 96, generator=generator) > 0.99) * 20.0
    return {
        "normal": normal(17, 576) * 0.05,
        "one block": normal(1, 32),
        "outliers": normal(33, 96) * 0.02 + outliers,
        "zero": torch.zeros(3, 64),
        "zero block": torch.cat((torch.zeros(5, 32), normal(5, 32)), dim=1),
        "constant": torch.full((3, 64), 0.7),
        "negative constant": torch.full((3, 64), -0.7),
        "ties in magnitude": torch.randint(-8, 9, (64, 256), generator=generator).float() / 8,
        "halves": (whole(64, 256) + 0.5) * 0.01,
        "whole": whole(64, 256) * 0.5,
        "scale below float16": normal(8, 64) * 1e-7,
        "subnormal": normal(8, 64) * 1e-40,
        "smallest": normal(8, 64) * 1e-44,
        "large": normal(8, 64) * 1e4,
    }


def _signed_zeros() -> dict[str, Tensor]:
    """Where gguf-py gives a scale or a minimum of zero another sign than llama.cpp."""
    zeros = torch.tensor([-0.0, 0.0])
    return {
        "negative zeros": torch.full((3, 64), -0.0),
        "zeros of both signs": zeros.repeat(3, 32),
        "zeros and positives": torch.cat((torch.tensor([0.0, -0.0, 0.5]).repeat(3, 21), torch.ones(3, 1)), dim=1),
        "zeros and negatives": torch.cat((torch.tensor([0.0, -0.0, -0.5]).repeat(3, 21), -torch.ones(3, 1)), dim=1),
    }


@pytest.mark.parametrize("type_name", CODECS)
@pytest.mark.parametrize("case", _cases())
def test_bytes_and_values_equal_gguf_py(type_name: str, case: str) -> None:
    weight = _cases()[case]
    kind = gguf.GGMLQuantizationType[type_name]
    with np.errstate(all="ignore"):
        expected = gguf.quantize(weight.numpy(), kind).view(np.uint8).reshape(weight.shape[0], -1)
    data = encode(weight, type_name)
    assert data.dtype == torch.uint8
    np.testing.assert_array_equal(data.numpy(), expected)
    values = gguf.dequantize(expected, kind).reshape(weight.shape)
    np.testing.assert_array_equal(decode(data, type_name, tuple(weight.shape)).numpy(), values)


@pytest.mark.parametrize("type_name", CODECS)
def test_tensor_operations_give_the_bytes_of_the_compiled_loops(type_name: str) -> None:
    """What other devices run, beside what the CPU does."""
    for case, weight in _cases().items():
        expected = CODECS[type_name].encode(weight.reshape(-1, CODECS[type_name].block))
        np.testing.assert_array_equal(encode(weight, type_name).flatten(), expected.flatten(), err_msg=case)


@pytest.mark.engine
@pytest.mark.parametrize("type_name", [name for name in CODECS if name != "F32"])
def test_bytes_equal_llama_cpp(type_name: str) -> None:
    number = int(gguf.GGMLQuantizationType[type_name])
    for case, weight in {**_cases(), **_signed_zeros()}.items():
        expected = llama_cpp.quantize(weight.numpy(), number, type_size(type_name, weight.shape[1]))
        np.testing.assert_array_equal(encode(weight, type_name).numpy(), expected, err_msg=case)


def test_half_precision_input_is_read_as_its_values() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).half()
    assert torch.equal(encode(weight, "Q4_1"), encode(weight.float(), "Q4_1"))


@pytest.mark.parametrize(
    ("type_name", "least_db"), [("Q8_0", 40), ("Q5_1", 27), ("Q5_0", 26), ("Q4_1", 20), ("Q4_0", 19)]
)
def test_error_is_what_the_bits_allow(type_name: str, least_db: float) -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(2))
    error = decode(encode(weight, type_name), type_name, (64, 512)) - weight
    assert 10 * torch.log10(weight.square().sum() / error.square().sum()) > least_db


def test_decodes_types_that_only_gguf_py_knows() -> None:
    block = np.zeros(66, dtype=np.uint8)  # TQ2_0: four codes of two bits a byte, less one; then a float16
    block[64:] = np.frombuffer(np.float16(0.5).tobytes(), dtype=np.uint8)
    data = torch.from_numpy(np.tile(block, (3, 2)))
    assert torch.equal(decode(data, "TQ2_0", (3, 512)), torch.full((3, 512), -0.5))


def test_decodes_a_super_block_by_hand() -> None:
    block = np.zeros(210, dtype=np.uint8)  # Q6_K: 128 low halves, 64 high pairs, 16 scales, one float16
    block[192:208] = 2
    block[208:] = np.frombuffer(np.float16(0.5).tobytes(), dtype=np.uint8)
    data = torch.from_numpy(np.tile(block, (3, 2)))
    assert torch.equal(decode(data, "Q6_K", (3, 512)), torch.full((3, 512), -32.0))  # (0 - 32) * 2 * 0.5


def test_row_sizes() -> None:
    assert type_size("Q4_0", 64) == 36
    assert type_size("Q8_0", 64) == 68
    assert type_size("F16", 7) == 14
    assert type_size("Q6_K", 256) == 210
    assert block_layout("Q5_1") == (32, 24)


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ModelError, match="block of 32 does not divide a row of 48"):
        encode(torch.zeros(2, 48), "Q4_0")
    with pytest.raises(ModelError, match="IQ2_S: cannot be encoded; expected one of F32, F16"):
        encode(torch.zeros(2, 256), "IQ2_S")
    with pytest.raises(ModelError, match="Q9_9: unknown"):
        type_size("Q9_9", 32)
    with pytest.raises(ModelError, match="takes 36 bytes, got 18"):
        decode(torch.zeros(1, 18, dtype=torch.uint8), "Q4_0", (2, 32))
