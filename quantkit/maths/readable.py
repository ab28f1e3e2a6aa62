"""How tensors on the CPU are given to compiled loops."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def readable(rows: Tensor) -> NDArray[Any]:
    """Inputs [tokens, in] as compiled loops read them: float32, or the bits of bfloat16."""
    if rows.dtype == torch.bfloat16:
        return rows.contiguous().view(torch.uint16).numpy()
    return rows.contiguous().float().numpy()
