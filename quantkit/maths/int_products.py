"""Products of 8-bit integers on a CPU, summed in 32 bits: torch's where the processor has units for them, else our own.

Without such units torch multiplies them one by one, a hundred times slower than float32 is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.arena import empty
from quantkit.device import has_avx2, has_int8_units
from quantkit.maths.compiled import writable
from quantkit.maths.products import strips


def code_bytes() -> int:
    """Bytes that a code of a right factor takes."""
    return 2 if _by_own_loops() else 1


def _by_own_loops() -> bool:
    """Where there are neither units nor AVX2, torch's way is what runs anywhere, though nothing asks for it."""
    return has_avx2() and not has_int8_units()


@dataclass(frozen=True)
class RightFactor:
    """The right factor of `left @ right.T` in the order in which it is multiplied.

    laid: int8 [k, n] for torch; int32 [panels, pairs, 16], two 16-bit integers in each, for the loops of
    `maths/int_kernel.py`. rows: n.
    """

    laid: Tensor
    rows: int

    def scaled_products(
        self, left: Tensor, along: Tensor, across: Tensor, bias: Tensor, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """left @ right.T * along[:, None] * across + bias: float32 or bfloat16 [m, n].

        left: codes int8 [m, k]; k is at most 133144, beyond which sums might overflow. along: float32 [m]. across,
        bias: float32 [n].
        """
        outputs = empty((len(left), self.rows), dtype)
        numbers = (along.numpy(), across.numpy(), bias.numpy(), writable(outputs))
        if self.laid.dtype == torch.int8:
            from quantkit.maths.eight_bit_kernels import scale_products

            scale_products(len(left), _products(left, self.laid).numpy(), *numbers)
        else:
            from quantkit.maths.int_kernel import blocks_of, multiply_panels, tasks_of_block

            tasks = tasks_of_block(len(left), torch.get_num_threads())
            multiply_panels(blocks_of(len(left)) * tasks, left.numpy(), self.laid.numpy(), *numbers, tasks)
        return outputs


def right_factor(codes: Tensor) -> RightFactor:
    """Codes int8 [n, k] as the right factor of products."""
    if not _by_own_loops():
        return RightFactor(codes.T, len(codes))
    from quantkit.maths.int_kernel import TILE_COLUMNS, lay_rows

    panels = _panels(len(codes), codes.shape[1], TILE_COLUMNS)
    lay_rows(len(panels), codes.contiguous().numpy(), panels.numpy())
    return RightFactor(panels, len(codes))


def add_gram(codes: Tensor, scale: Tensor, gram: Tensor, *, fresh: bool) -> None:
    """Add codes^T codes, scaled, to the upper triangle of `gram` float32 [n, n]; what is below it may change too.

    codes: int8 [tokens, n], of at most 133144 tokens, beyond which sums might overflow. scale: float32 [n], the step of
    each column. fresh: `gram` holds nothing yet.
    """
    _add(codes, scale, codes, scale, gram, upper=True, fresh=fresh)


def add_products(left: Tensor, across: Tensor, right: Tensor, along: Tensor, total: Tensor) -> None:
    """Add left^T right, scaled, to `total` float32 [m, n]: codes int8 [tokens, m] and [tokens, n], of as many tokens at
    most, steps of their columns float32 [m] and [n]."""
    _add(left, across, right, along, total, upper=False, fresh=False)


def _add(
    left: Tensor, across: Tensor, right: Tensor, along: Tensor, total: Tensor, *, upper: bool, fresh: bool
) -> None:
    if _by_own_loops():
        from quantkit.maths.int_kernel import (
            TILE_COLUMNS,
            TILE_ROWS,
            add_panels,
            blocks_of,
            lay_left,
            lay_right,
            tasks_of_block,
        )

        laid = _panels(left.shape[1], len(left), TILE_ROWS), _panels(right.shape[1], len(right), TILE_COLUMNS)
        lay_left(len(laid[0]), left.numpy(), laid[0].numpy())
        lay_right(len(laid[1]), right.numpy(), laid[1].numpy())
        tasks = tasks_of_block(len(total), torch.get_num_threads())
        given = (laid[0].numpy(), laid[1].numpy(), across.numpy(), along.numpy(), total.numpy())
        add_panels(blocks_of(len(total)) * tasks, *given, upper, fresh, tasks)
        return
    from quantkit.maths.gram_kernels import add_scaled

    for strip in strips(len(total)):
        behind = slice(strip.start if upper else 0, None)
        product = _products(left[:, strip].T, right[:, behind])
        own: Any = total[strip, behind].numpy()
        add_scaled(len(product), product.numpy(), across[strip].numpy(), along[behind].numpy(), own, fresh)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """left @ right: int32 [m, n] for int8 [m, k] and [k, n], by torch."""
    return torch._int_mm(left, right, out=empty((left.shape[0], right.shape[1]), torch.int32))


def _panels(rows: int, inner: int, width: int) -> Tensor:
    """Room for so many rows of `inner` numbers as panels: int32 [panels, pairs, width]."""
    return empty((-(-rows // width), -(-inner // 2), width), torch.int32)
