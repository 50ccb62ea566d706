"""95 % intervals of means."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 2_000
PERCENTILES = (2.5, 97.5)


@dataclass(frozen=True)
class Estimate:
    """A figure and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def bootstrap_mean(values: Sequence[float] | np.ndarray, *, seed: int = 0) -> Estimate:
    """Average at least one value, with the percentile interval of the bootstrap.

    Equal values give an interval of width 0; then 3 / n bounds the fraction of other values (the
    rule of three).

    Source: Efron 1979, percentile intervals.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or not len(sample):
        raise ValueError(f"values: got shape {sample.shape}, expected one value or more in a row")
    # (resamples, values): each row is another sample of the same size, with replacement.
    chosen = np.random.default_rng(seed).integers(len(sample), size=(NUM_RESAMPLES, len(sample)))
    low, high = np.percentile(sample[chosen].mean(axis=1), PERCENTILES)
    return Estimate(float(sample.mean()), float(low), float(high))


def percentile_estimate(values: Sequence[float] | np.ndarray) -> Estimate:
    """Summarize results on many subsamples: their mean and the range of the middle 95 %."""
    low, high = np.percentile(values, PERCENTILES)
    return Estimate(float(np.mean(values)), float(low), float(high))
