"""Guidance schedule and filters, written out slowly."""

import math

from torch import Tensor

from dalle_mini_impl.sampling.sampler import SamplingConfig


def slow_scale(sampling_config: SamplingConfig, step: int, num_steps: int) -> float:
    if sampling_config.guidance_schedule == "constant":
        return sampling_config.guidance_scale
    progress = 0.5 - 0.5 * math.cos(math.pi * ((step + 1) / num_steps) ** 2)
    return 1 + (sampling_config.guidance_scale - 1) * progress


def slow_allowed(logits: Tensor, sampling_config: SamplingConfig) -> list[int]:
    """Tokens that survive top-k and then top-p, found one by one from the likeliest down."""
    ranked = sorted(range(len(logits)), key=lambda token: -float(logits[token]))
    ranked = ranked[: sampling_config.top_k or None]
    fractions = logits[ranked].softmax(-1).tolist()
    allowed: list[int] = []
    for rank, token in enumerate(ranked):
        if sum(fractions[:rank]) < sampling_config.top_p:
            allowed.append(token)
    return allowed
