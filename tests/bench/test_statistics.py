"""Standard errors and quantiles against plain computations."""

from __future__ import annotations

import numpy as np
import pytest

from quantkit.bench.statistics import quantile, standard_error


def test_one_sequence_has_no_standard_error() -> None:
    assert standard_error([1.0]) is None
    assert standard_error([1.0, 3.0]) == pytest.approx(1.0)
    assert quantile(np.array([[1.0, 2.0, 3.0]]), 0.5) == (2.0, None)


def test_the_error_of_a_quantile_is_that_of_sequences_drawn_again() -> None:
    generator = np.random.default_rng(1)
    # sequences differ as texts do: tokens of one are more alike than those of two
    values = generator.exponential(size=(12, 200)) * generator.uniform(0.5, 2.0, size=(12, 1))
    found, error = quantile(values, 0.95)
    assert found == np.quantile(values, 0.95)
    again = [np.quantile(values[generator.integers(12, size=12)], 0.95) for _ in range(2000)]
    assert error == pytest.approx(float(np.std(again, ddof=1)), rel=0.1)
    single = [np.quantile(generator.choice(values.ravel(), size=values.size), 0.95) for _ in range(500)]
    assert error > 1.5 * float(np.std(single)), "tokens drawn one by one would hide how texts differ"
