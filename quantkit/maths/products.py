"""Float32 products on a CPU by oneDNN, whose loops are made for the processor at hand.

PyTorch gives float32 to MKL, which takes its AVX2 loops on processors of other makers: half the rate where AVX-512 is
there at full width (210 beside 450 GFLOP/s on two cores of an AMD EPYC of family 26).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quantkit.arena import empty_on
from quantkit.device import has_avx512

BAND_VALUES = 1 << 21
"""Values that are worked on together where each row stands alone: products are large, and what is held for a wide
layer, several times as much, is small beside its weight. All of a group of SmolLM2's linears are one band."""


def times_transposed(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right.T`: float32 [m, n] for float32 [m, k] and [n, k] of one device.

    A shape is compiled when it comes first, and takes memory from then on: one that is different every time should be
    `padded`.
    """
    linear = _onednn_linear() if left.device.type == "cpu" else None
    if linear is None:
        return torch.mm(left, right.T, out=empty_on(left.device, (len(left), len(right)), left.dtype))
    # a turned view would go through its reference loops, a thousand times slower
    return linear(left.contiguous(), right.contiguous(), None, "none", [], "")  # type: ignore[no-any-return]


def padded(count: int) -> int:
    """A number of rows or columns rounded up to one of a few: powers of two from 64 on, thousands from 1024 on."""
    unit = min(max(64, 1 << (count - 1).bit_length()), 1024)
    return -(-count // unit) * unit


def product_bands(matrix: Tensor) -> Iterator[slice]:
    """Rows of a matrix [rows, columns] that are worked on together, where what is held for each is as large as it: of
    about BAND_VALUES values on a CPU, at least one; all elsewhere.

    Bands are even: products of a single row would go by other loops, to other bits.
    """
    rows = len(matrix)
    bands = max(1, min(rows, -(-matrix.numel() // BAND_VALUES))) if matrix.device.type == "cpu" else 1
    ends = [rows * band // bands for band in range(1, bands + 1)]
    for start, end in zip([0, *ends], ends, strict=False):
        yield slice(start, end)


def strips(columns: int) -> Iterator[slice]:
    """Rows of a matrix of so many that are summed in one product; those of a Gram matrix from their first one's column
    on, since the lower triangle is the mirror.

    Few strips keep the products large, many skip more of the triangle. A quarter was fastest from 576 to 1536 columns.
    """
    width = max(64, -(-columns // 4))
    for start in range(0, columns, width):
        yield slice(start, min(start + width, columns))


@cache
def _onednn_linear() -> Any:
    """The operator that torch.compile uses for linears, None where it is not there or not the faster one."""
    if not (has_avx512() and torch.backends.mkldnn.is_available()):
        return None
    operators = torch.ops.mkldnn
    return operators._linear_pointwise.default if hasattr(operators, "_linear_pointwise") else None


@contextmanager
def rounding_allowed() -> Iterator[None]:
    """While this lasts, float32 matrix products on a CPU may round what they multiply to bfloat16.

    With AVX-512 PyTorch then asks oneDNN instead of MKL, which rounds where the processor has matrix units and gains by
    it, and else multiplies float32 in loops made for the processor. Sums are float32 either way.
    """
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined] # made when the module is imported
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before
