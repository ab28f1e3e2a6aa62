"""Float32 products: by compiled loops of our own on a CPU with AVX-512 (`maths/float_kernel.py`), else torch's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantkit.arena import empty_on
from quantkit.device import multiplies_wide_floats
from quantkit.maths.compiled import all_between

BAND_VALUES = 1 << 21
"""Values that are worked on together where each row stands alone: products are large, and what is held for a wide
layer, several times as much, is small beside its weight. All of a group of SmolLM2's linears are one band."""

SMALL_BAND_VALUES = 1 << 19
"""The same where there is little to multiply, or nothing: 2 MB in float32. Ranges are searched with several
arrays of candidates, 15 MB for all rows of SmolLM2's gates, 4 for such a band."""

PANEL_VALUES = 1 << 20
"""Values of a right factor that are laid out at once: 4 MB."""


def times_transposed(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right.T`: float32 [m, n] for float32 [m, k] and [n, k] of one device."""
    found = empty_on(left.device, (len(left), len(right)), left.dtype)
    if not _by_own_loops(left):
        return torch.mm(left, right.T, out=found)
    _multiply(left, right, found, 1.0, fresh=True)
    return found


def add_times_transposed(total: Tensor, left: Tensor, right: Tensor, factor: float = 1.0) -> None:
    """Add factor * left @ right.T to `total` float32 [m, n], whose rows are each in one piece: factor 1 or -1, the
    others as in `times_transposed`."""
    if _by_own_loops(left):
        _multiply(left, right, total, factor, fresh=False)
    else:
        total.add_(times_transposed(left, right), alpha=factor)


def _by_own_loops(left: Tensor) -> bool:
    return left.device.type == "cpu" and left.dtype == torch.float32 and multiplies_wide_floats()


def _multiply(left: Tensor, right: Tensor, total: Tensor, factor: float, *, fresh: bool) -> None:
    """Write or add factor * left @ right.T to `total`, which may lie in one matrix with the factors, but shares no
    element with them. Raises ValueError where shapes, dtypes or steps are not those of `add_times_transposed`."""
    from quantkit.maths.float_kernel import BLOCK_ROWS, TILE_COLUMNS, lay_panels, multiply_floats
    from quantkit.maths.int_kernel import blocks_of, tasks_of_block

    rows, columns = total.shape
    depth = right.shape[1]
    if left.shape != (rows, depth) or len(right) != columns:
        raise ValueError(f"{list(left.shape)} times {list(right.shape)} turned is not {list(total.shape)}")
    if {left.dtype, right.dtype, total.dtype} != {torch.float32} or (columns > 1 and total.stride(1) != 1):
        raise ValueError("the loops are for float32 matrices and whole rows")
    if not total.numel():
        return
    if 1 not in right.stride():
        right = right.contiguous()
    if left.stride(1) != 1:
        left = left.contiguous()
    tasks = tasks_of_block(rows, torch.get_num_threads(), BLOCK_ROWS)
    band = max(1, PANEL_VALUES // max(1, TILE_COLUMNS * depth)) * TILE_COLUMNS
    for start in range(0, columns, band):
        part, own = right[start : start + band], total[:, start : start + band]
        panels = empty_on(left.device, (-(-len(part) // TILE_COLUMNS), depth, TILE_COLUMNS))
        lay_panels(len(panels), all_between(part), *part.stride(), len(part), panels.numpy())
        given = (all_between(left), left.stride(0), panels.numpy(), all_between(own), own.stride(0), rows, len(part))
        multiply_floats(blocks_of(rows, BLOCK_ROWS) * tasks, *given, np.float32(factor), fresh, tasks)


def product_bands(matrix: Tensor, values: int | None = None) -> Iterator[slice]:
    """Rows of a matrix [rows, columns] that are worked on together, where what is held for each is as large as it: of
    about so many values on a CPU, BAND_VALUES unless told, at least one row; all elsewhere.

    Bands are even: torch multiplies a single row by other loops, to other bits.
    """
    rows = len(matrix)
    bands = max(1, min(rows, -(-matrix.numel() // (values or BAND_VALUES)))) if matrix.device.type == "cpu" else 1
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
