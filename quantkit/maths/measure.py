"""How far a quantized weight is from the one it stands for."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from quantkit.tensors import band_size


def energies(weight: Tensor, pieces: Iterable[Tensor]) -> tuple[float, float]:
    """Sum of the squares of a weight, and of its differences from what stands for it.

    weight: [out, in], any float dtype. pieces: of the other, in the same order: float32 [count], [count] and so on.
    Sums run in float32 over a band of values, in float64 over the bands.
    """
    signal = noise = 0.0
    flat, start = weight.reshape(-1), 0
    for piece in pieces:
        for part in piece.split(band_size(flat)):
            reference = flat[start : start + len(part)].float()
            error = reference - part.to(reference.device)
            signal += float(reference.dot(reference))
            noise += float(error.dot(error))
            start += len(part)
    return signal, noise


def sqnr_db(signal: float, noise: float) -> float | None:
    """Signal to quantization noise in dB, `10 log10(sum w^2 / sum (w - q)^2)`; None for an all-zero or exact weight."""
    if noise == 0.0 or signal == 0.0:
        return None
    return 10.0 * math.log10(signal / noise)
