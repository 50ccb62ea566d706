"""Intervals have the width of the theory, and are the same each time."""

import math

import numpy as np
import pytest

from dalle_mini_impl.evaluation.bootstrap import Estimate, bootstrap_mean, percentile_estimate


def test_interval_has_two_standard_errors() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    found = bootstrap_mean(values)
    error = values.std() / math.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error * 2)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error * 2)
    assert bootstrap_mean(values) == found
    assert bootstrap_mean([1.0, 1.0]) == Estimate(1.0, 1.0, 1.0)


def test_no_values_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one value or more"):
        bootstrap_mean([])


def test_percentiles_of_subsamples() -> None:
    found = percentile_estimate(np.arange(101.0))
    assert (found.value, found.low, found.high) == (50.0, 2.5, 97.5)
