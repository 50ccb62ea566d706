"""Intervals have the width of the theory, and are the same each time."""

import math

import numpy as np
import pytest

from dalle_mini_impl.evaluation.bootstrap import Estimate, bootstrap_mean, percentile_estimate


def test_interval_has_two_standard_errors() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    found = bootstrap_mean(values)
    error, mean = values.std() / math.sqrt(400), values.mean()
    assert found.value == pytest.approx(mean)
    expected = (mean - 1.96 * error, mean + 1.96 * error)
    assert (found.low, found.high) == pytest.approx(expected, abs=0.2 * error)
    assert bootstrap_mean(values) == found
    assert bootstrap_mean([1.0, 1.0]) == Estimate(1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="expected one value or more"):
        bootstrap_mean([])


def test_percentiles_of_subsamples() -> None:
    found = percentile_estimate(np.arange(101.0))
    assert (found.value, found.low, found.high) == (50.0, 2.5, 97.5)
