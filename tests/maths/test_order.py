"""Columns in another order, as indexing gives them."""

from __future__ import annotations

import pytest
import torch

from quantkit.maths.order import reordered


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_reordered_is_what_indexing_gives(dtype: torch.dtype) -> None:
    matrix = torch.arange(35).reshape(5, 7).to(dtype)
    columns, rows = torch.tensor([6, 0, 3, 3]), torch.tensor([4, 1, 1])
    assert torch.equal(reordered(matrix, columns), matrix[:, columns])
    assert torch.equal(reordered(matrix, columns, rows), matrix[rows][:, columns])
    assert torch.equal(reordered(matrix.T, rows), matrix.T[:, rows])
    assert reordered(matrix[:0], columns).shape == (0, 4)


def test_a_device_without_the_loop_gives_the_same_shapes() -> None:
    matrix = torch.empty(5, 7, device="meta")
    found = reordered(matrix, torch.zeros(4, dtype=torch.int64, device="meta"))
    assert found.shape == (5, 4) and found.device.type == "meta"
