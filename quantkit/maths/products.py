"""Float32 products on a CPU by oneDNN, whose loops are made for the processor at hand.

PyTorch gives float32 to MKL, which takes its AVX2 loops on processors of other makers: half the rate where AVX-512 is
there at full width (210 beside 450 GFLOP/s on two cores of an AMD EPYC of family 26).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor


def times_transposed(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right.T`: float32 [m, n] for float32 [m, k] and [n, k] of one device."""
    linear = _onednn_linear() if left.device.type == "cpu" else None
    if linear is None:
        return left @ right.T
    # a turned view would go through its reference loops, a thousand times slower
    return linear(left.contiguous(), right.contiguous(), None, "none", [], "")  # type: ignore[no-any-return]


@cache
def _onednn_linear() -> Any:
    """The operator that torch.compile uses for linears, None where it is not there or not the faster one."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if not (known.get("avx512_f") and torch.backends.mkldnn.is_available()):
        return None
    operators = torch.ops.mkldnn
    return operators._linear_pointwise.default if hasattr(operators, "_linear_pointwise") else None
