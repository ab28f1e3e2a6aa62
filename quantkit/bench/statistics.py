"""Uncertainty of what is measured on text: sequences are drawn again, not tokens, which lean on each other."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
SEED = 0


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of independent values, None for a single one."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def interquartile_range(values: Sequence[float]) -> float | None:
    """Third quartile minus first, None for a single value."""
    if len(values) < 2:
        return None
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return third - first


def quantile(values: NDArray[np.float64], share: float) -> tuple[float, float | None]:
    """The `share` quantile over all positions, and its bootstrap standard error over sequences.

    values: float64 [sequences, positions]. The error is None for a single sequence. Source: Efron and Tibshirani, An
    Introduction to the Bootstrap, 1993, chapter 6.
    """
    found = float(np.quantile(values, share))
    if len(values) < 2:
        return found, None
    ordered = np.sort(values, axis=None)
    # counts of each sequence's values up to every value: the quantile of a resample needs no sorting of its own
    owner = np.argsort(values, axis=None) // values.shape[1]
    generator = np.random.default_rng(SEED)
    draws = generator.multinomial(len(values), np.full(len(values), 1 / len(values)), size=RESAMPLES)
    needed = share * len(values) * values.shape[1]
    places = [int(np.searchsorted(np.cumsum(draw[owner]), needed)) for draw in draws]
    again = ordered[np.minimum(places, len(ordered) - 1)]
    return found, float(np.std(again, ddof=1))
