"""Learning rate and other values over a run, as functions of the step and of progress alone."""

import math
from typing import Literal


def learning_rate_factor(
    step: int,
    progress: float,
    *,
    warmup_steps: int,
    schedule: Literal["wsd", "cosine", "inverse_sqrt"],
    decay_fraction: float = 0.25,
    cosine_ends_at: float = 1.0,
    cosine_floor: float = 0.0,
) -> float:
    """Return the factor of the base learning rate, in [0, 1].

    Progress, not the step, drives the decay, so that a run with a time budget finishes its
    schedule on a machine of any speed.

    All warm up linearly over ``warmup_steps``. Sources: ``wsd`` (warm-up, stable, linear decay):
    Hu et al. 2024, arXiv:2404.06395; ``cosine``: Loshchilov & Hutter 2017, arXiv:1608.03983;
    ``inverse_sqrt``: Vaswani et al. 2017, arXiv:1706.03762, equation 3.
    """
    warmup = min(1.0, (step + 1) / max(1, warmup_steps))
    if schedule == "cosine":
        return warmup * anneal(progress, start=1.0, end=cosine_floor, over=cosine_ends_at)
    if schedule == "inverse_sqrt":
        # Whatever the progress. The paper's own peak is (hidden_size * warmup_steps) ** -0.5.
        return warmup * min(1.0, math.sqrt(max(1, warmup_steps) / (step + 1)))
    # Linear to zero in the last `decay_fraction` of the run.
    return warmup * min(1.0, max(0.0, 1 - progress) / decay_fraction)


def anneal(progress: float, *, start: float, end: float, over: float = 1.0) -> float:
    """Go from ``start`` to ``end`` along half a cosine until progress ``over``, then stay."""
    fraction = min(1.0, progress / over)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * fraction))
