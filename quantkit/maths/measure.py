"""How far a quantized weight is from the one it stands for."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sqnr_db(weight: Tensor, approximation: Tensor) -> float | None:
    """Signal to quantization noise in dB, `10 log10(sum w^2 / sum (w - q)^2)`; None for an all-zero or exact weight.

    weight, approximation: one shape, any float dtype; sums run in float64.
    """
    reference = weight.float()
    noise = float((reference - approximation.to(reference.device)).square().sum(dtype=torch.float64))
    signal = float(reference.square().sum(dtype=torch.float64))
    if noise == 0.0 or signal == 0.0:
        return None
    return 10.0 * math.log10(signal / noise)
