"""How far a quantized weight is from the one it stands for."""

from __future__ import annotations

import math

from torch import Tensor

from quantkit.tensors import row_bands


def sqnr_db(weight: Tensor, approximation: Tensor) -> float | None:
    """Signal to quantization noise in dB, `10 log10(sum w^2 / sum (w - q)^2)`; None for an all-zero or exact weight.

    weight, approximation: [out, in], any float dtype; sums run in float32
    over a band of rows, in float64 over the bands.
    """
    noise = signal = 0.0
    for rows in row_bands(weight):
        reference = weight[rows].float().flatten()
        error = reference - approximation[rows].to(reference.device).flatten()
        signal += float(reference.dot(reference))
        noise += float(error.dot(error))
    if noise == 0.0 or signal == 0.0:
        return None
    return 10.0 * math.log10(signal / noise)
