"""How sure a comparison of two models on the same questions is: the paired bootstrap. Numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
SEED = 0
LEVEL = 0.95


def recovered_interval(
    baseline: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]]
) -> tuple[float, float] | None:
    """The 95% interval of the candidate's mean score over the baseline's, questions resampled in pairs.

    baseline, candidate: per task the scores of its questions [questions], in the same order in both; tasks count
    alike, whatever their length. Returns (low, high) as a ratio, None when the baseline's score may be zero.
    Raises ValueError when a task's lengths differ or it is empty. Source: Efron and Tibshirani, An Introduction to the
    Bootstrap, 1993, chapter 13 (percentile interval).
    """
    generator = np.random.default_rng(SEED)
    below = np.zeros(RESAMPLES)
    above = np.zeros(RESAMPLES)
    for one, other in zip(baseline, candidate, strict=True):
        below_task, above_task = _resampled_means(one, other, generator)
        below += below_task
        above += above_task
    if (below <= 0).any():
        return None
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(above / below, [tail, 1 - tail])
    return float(low), float(high)


def _resampled_means(
    baseline: Sequence[float], candidate: Sequence[float], generator: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means of both over resampled questions, each [resamples].

    Questions with the same pair of scores are alike, so drawing how often each distinct pair occurs is the same as
    drawing questions one by one, and for right-or-wrong scores it is four counts whatever the number of questions.
    """
    if len(baseline) != len(candidate) or not len(baseline):
        raise ValueError(f"expected the same questions in both, got {len(baseline)} and {len(candidate)}")
    pairs, counts = np.unique(np.column_stack([baseline, candidate]), axis=0, return_counts=True)  # [distinct, 2]
    draws = generator.multinomial(len(baseline), counts / counts.sum(), size=RESAMPLES)  # [resamples, distinct]
    means = draws @ pairs / len(baseline)  # [resamples, 2]
    return means[:, 0], means[:, 1]
