"""How sure a figure is: means with the interval that another sample of the same size would give."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 2_000
PERCENTILES = (2.5, 97.5)


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    """The figure itself."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""


def bootstrap_mean(values: Sequence[float] | np.ndarray, *, seed: int = 0) -> Estimate:
    """Average, with the percentile interval of the bootstrap.

    Values that are all equal give an interval of no width: then 3 / n bounds the fraction of others
    (the rule of three).

    Args:
        values: One per image; at least one.
        seed: Of the resampling.

    Returns:
        Mean and interval.

    Raises:
        ValueError: If there are no values.

    Source: Efron 1979, percentile intervals.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or not len(sample):
        raise ValueError(f"values: got shape {sample.shape}, expected one value or more in a row")
    chosen = np.random.default_rng(seed).integers(len(sample), size=(NUM_RESAMPLES, len(sample)))
    low, high = np.percentile(sample[chosen].mean(axis=1), PERCENTILES)
    return Estimate(float(sample.mean()), float(low), float(high))


def percentile_estimate(values: Sequence[float] | np.ndarray) -> Estimate:
    """Turn the results on many subsamples into a figure.

    Args:
        values: One per subsample.

    Returns:
        Their mean, and the range of the middle 95 %.
    """
    low, high = np.percentile(values, PERCENTILES)
    return Estimate(float(np.mean(values)), float(low), float(high))
