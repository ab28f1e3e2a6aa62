"""Blocks taken apart and put together: the same bytes, and parts that mean what gguf-py decodes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from quantkit.maths.ggml import block_layout
from quantkit.maths.ggml_codes import LAYOUTS, put, take


def _random_bytes(type_name: str, rows: int = 5, blocks: int = 3) -> torch.Tensor:
    """Every bit random but those of the float16 numbers, which are finite."""
    generator = torch.Generator().manual_seed(0)
    _, size = block_layout(type_name)
    data = torch.randint(0, 256, (rows * blocks, size), dtype=torch.uint8, generator=generator)
    for start in (LAYOUTS[type_name].scale_at, LAYOUTS[type_name].minimum_at):
        if start is not None:
            number = torch.randn(rows * blocks, 1, generator=generator).half()
            data[:, start : start + 2] = number.view(torch.uint8)
    return data.view(rows, -1)


@pytest.mark.parametrize("type_name", LAYOUTS)
def test_what_was_taken_is_put_back(type_name: str) -> None:
    data = _random_bytes(type_name)
    assert torch.equal(put(take(data, type_name), type_name), data)


@pytest.mark.parametrize("type_name", LAYOUTS)
def test_parts_mean_what_gguf_decodes(type_name: str) -> None:
    data, layout = _random_bytes(type_name), LAYOUTS[type_name]
    coded = take(data, type_name)
    value = layout.table(torch.device("cpu"))[coded.codes.long()].unflatten(1, (-1, layout.group))
    weight = (coded.step.unsqueeze(2) * value - coded.base.unsqueeze(2)).flatten(1)
    expected = gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[type_name])
    np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-6, atol=1e-4)
    if layout.levels is not None:
        assert layout.levels[0] <= int(coded.level.amin()) and int(coded.level.amax()) <= layout.levels[1]
