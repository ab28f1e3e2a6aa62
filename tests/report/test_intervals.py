"""The paired bootstrap against cases whose answer is known, and against one that resamples question by question; the
replication interval of speeds against runs that are drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest

from quantkit.report.intervals import NORMAL_95, another_run, recovered_interval, student_95


def scores(both: int, lost: int, gained: int, neither: int) -> tuple[list[float], list[float]]:
    """Right-or-wrong scores of two models, by how their answers pair up."""
    baseline = [1.0] * (both + lost) + [0.0] * (gained + neither)
    candidate = [1.0] * both + [0.0] * lost + [1.0] * gained + [0.0] * neither
    return baseline, candidate


def test_equal_answers_recover_everything() -> None:
    baseline, candidate = scores(60, 0, 0, 40)
    assert recovered_interval([baseline], [candidate]) == (1.0, 1.0)


def test_agrees_with_the_variance_of_a_ratio() -> None:
    """With many questions the interval is normal: var(log ratio) = (lost / n1^2 + gained / n0^2) for n0 ~ n1."""
    both, lost, gained, neither = 6000, 300, 200, 3500
    baseline, candidate = scores(both, lost, gained, neither)
    before, after, n = both + lost, both + gained, both + lost + gained + neither
    # delta method on log(mean candidate) - log(mean baseline), from the covariance of the pair
    var = (1 / after - 1 / n) + (1 / before - 1 / n) - 2 * (n * both - before * after) / (n * before * after)
    ratio = after / before
    expected = [ratio * math.exp(sign * 1.96 * math.sqrt(var)) for sign in (-1, 1)]
    assert recovered_interval([baseline], [candidate]) == pytest.approx(expected, abs=4e-4)


def test_equals_resampling_questions_one_by_one() -> None:
    generator = np.random.default_rng(7)
    one = generator.random(37)
    other = np.clip(one + generator.normal(0, 0.2, 37), 0, 1)
    ratios = []
    for _ in range(20_000):
        drawn = generator.integers(0, 37, 37)
        ratios.append(other[drawn].mean() / one[drawn].mean())
    found = recovered_interval([list(one)], [list(other)])
    assert found == pytest.approx(np.quantile(ratios, [0.025, 0.975]), abs=0.004)


def test_pairing_makes_it_narrow() -> None:
    baseline, candidate = scores(600, 10, 10, 380)
    paired = recovered_interval([baseline], [candidate])
    shuffled = recovered_interval([baseline], [list(np.random.default_rng(0).permutation(candidate))])
    assert paired is not None and shuffled is not None
    assert paired[1] - paired[0] < (shuffled[1] - shuffled[0]) / 3


def test_tasks_count_alike() -> None:
    """Half the score lost on 10 questions and nothing on 1000 is 75% recovered, not 99.5%."""
    small, large = [1.0] * 10, [1.0] * 1000
    low, high = recovered_interval([small, large], [[0.5] * 10, large]) or (0, 0)
    assert low == pytest.approx(0.75) and high == pytest.approx(0.75)


def test_is_the_same_every_time() -> None:
    baseline, candidate = scores(50, 5, 3, 42)
    assert recovered_interval([baseline], [candidate]) == recovered_interval([baseline], [candidate])


def test_a_baseline_that_may_score_nothing_has_no_interval() -> None:
    baseline, candidate = scores(1, 0, 0, 9)
    assert recovered_interval([baseline], [candidate]) is None


@pytest.mark.parametrize(("one", "other"), [([1.0, 0.0], [1.0]), ([], [])])
def test_other_questions_are_refused(one: list[float], other: list[float]) -> None:
    with pytest.raises(ValueError, match="expected the same questions"):
        recovered_interval([one], [other])


def test_students_t_of_few_values_and_of_many() -> None:
    # Student, The probable error of a mean, Biometrika 6, 1908; later tables: 12.706, 2.776, and 1.960 in the end
    assert student_95(2) == pytest.approx(12.706, abs=1e-3)
    assert student_95(5) == pytest.approx(2.776, abs=1e-3)
    assert student_95(10**6) == pytest.approx(NORMAL_95, abs=1e-3)


@pytest.mark.parametrize("count", [3, 5, 8])
def test_another_run_lies_in_the_interval_as_often_as_it_says(count: int) -> None:
    generator = np.random.default_rng(1)
    inside = []
    for _ in range(4000):
        first, second = (np.exp(generator.normal(3.0, 0.2, count)) for _ in range(2))
        low, high = another_run(list(first)) or (0.0, 0.0)
        inside.append(low <= np.median(second) <= high)
    assert 0.94 < np.mean(inside) < 0.985


def test_another_run_of_a_rate_and_of_its_time_are_one_interval() -> None:
    rates = [100.0, 130.0, 90.0, 110.0, 105.0]
    low, high = another_run(rates) or (0.0, 0.0)
    assert another_run([1 / rate for rate in rates]) == pytest.approx((1 / high, 1 / low))
    assert another_run([7.0]) is None and another_run([]) is None and another_run([0.0, 1.0]) is None
