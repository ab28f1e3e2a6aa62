"""How compiled loops are made ready, and tensors on the CPU given to them."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkit.quiet import loading_modules


def ready_loops() -> None:
    """Import what the first compiled loop asks for, two hundred modules."""
    with loading_modules():
        from numba.core.registry import cpu_target  # type: ignore[import-untyped]

        cpu_target.target_context.refresh()


def readable(numbers: Tensor) -> NDArray[Any]:
    """Numbers of any shape and float dtype as compiled loops read them: float32, or the bits of bfloat16; a copy where
    they are neither or not in one piece."""
    if numbers.dtype == torch.bfloat16:
        return numbers.contiguous().view(torch.uint16).numpy()
    return numbers.contiguous().float().numpy()


def writable(numbers: Tensor) -> NDArray[Any]:
    """Room in one piece, float32 or bfloat16, as compiled loops write to it: never a copy."""
    if numbers.dtype not in (torch.float32, torch.bfloat16) or not numbers.is_contiguous():
        raise TypeError(f"compiled loops write float32 or bfloat16 in one piece, not {numbers.dtype}")
    return readable(numbers)


def all_between(numbers: Tensor) -> NDArray[Any]:
    """From the first of such numbers to the last, what lies between them included: how compiled loops reach part of a
    larger tensor by its steps. Of float32 and bfloat16, as its bits, it is never a copy."""
    span = 1 + sum((size - 1) * step for size, step in zip(numbers.shape, numbers.stride(), strict=True))
    return readable(torch.as_strided(numbers.detach(), (span if numbers.numel() else 0,), (1,)))
