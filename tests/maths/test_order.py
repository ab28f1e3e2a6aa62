"""Columns in another order, as indexing gives them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.maths.order import mirror, reorder_upper, reordered


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


@pytest.mark.parametrize("size", [1, 2, 3, 70])
def test_the_upper_triangle_takes_the_order_and_the_lower_one_stays(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(size)
    order = torch.randperm(size, generator=generator)
    symmetric = torch.randn(size, size, generator=generator)
    symmetric = symmetric + symmetric.T
    matrix = symmetric.tril() + 7.0 * torch.ones(size, size).triu(1)  # what is above the diagonal is not read
    by_tensors = matrix.clone()
    reorder_upper(matrix, order)
    assert torch.equal(matrix.triu(1), symmetric[order][:, order].triu(1))
    assert torch.equal(matrix.tril(), symmetric.tril())
    monkeypatch.setattr(Tensor, "device", torch.device("cuda"))  # the path of a GPU, on the CPU
    reorder_upper(by_tensors, order)
    assert torch.equal(by_tensors, matrix)


@pytest.mark.parametrize("by_tensors", [False, True])
@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 64, 129, 333])
def test_one_triangle_mirrors_the_other_whatever_it_held(
    columns: int, dtype: torch.dtype, upper: bool, by_tensors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    triangle = torch.randn(columns, columns, generator=torch.Generator().manual_seed(0), dtype=dtype).triu()
    whole, lost = triangle + triangle.triu(1).T, torch.full_like(triangle, torch.nan).tril(-1)
    matrix = (triangle + lost if upper else (triangle + lost).T).contiguous()
    if by_tensors:
        monkeypatch.setattr(Tensor, "device", torch.device("cuda"))  # the path of a GPU, on the CPU
    mirror(matrix, upper=upper)
    assert torch.equal(matrix, whole)
