"""How sure a comparison of two models on the same questions is, and how sure a speed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
SEED = 0
LEVEL = 0.95

NORMAL_95 = 1.96


def student_95(count: int) -> float:
    """Standard errors on either side of a mean of `count` values that hold 95%: Student's t. Two values at least."""
    from scipy.special import stdtrit  # a tenth of a second, else of every command that quantizes

    return float(stdtrit(count - 1, 1 - (1 - LEVEL) / 2))


def another_run(values: Sequence[float]) -> tuple[float, float] | None:
    """Where the median of as many further values would lie, 95%: the replication interval of a speed.

    values: positive, one for each fresh process. Speeds vary by factors, so logarithms are taken. The medians of two
    runs are apart by the errors of both; with n values of deviation s, a median's is at most s sqrt(pi / 2n), what it
    tends to in large normal samples. None for a single value or one that is not positive. Source: Hahn and Meeker,
    Statistical Intervals, 1991, chapter 4 (the interval for the mean of a further sample, here of its median).
    """
    if len(values) < 2 or min(values) <= 0:
        return None
    error = statistics.stdev(math.log(value) for value in values) * math.sqrt(math.pi / len(values))
    away = math.exp(student_95(len(values)) * error)
    middle = statistics.median(values)
    return middle / away, middle * away


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
