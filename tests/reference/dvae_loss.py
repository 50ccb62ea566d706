"""DALL-E's discrete VAE in float64, one sum after the other: its loss terms and its schedules."""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def cosine(fraction: float, start: float, end: float) -> float:
    """Half a cosine from start to end; a fraction beyond 1 stays there."""
    return start + (end - start) * (1 - math.cos(math.pi * min(1.0, fraction))) / 2


def negative_log_likelihood(mean: Array, raw_log_scale: Array, pixels: Array) -> float:
    """Mean over pixel values of -log p(x | mu, b), with our floor of -5 under ln b.

    p(x | mu, b) = exp(-|logit(x) - mu| / b) / (2 b x (1 - x)), x in [0.1, 0.9].
    """
    total = 0.0
    for mu, raw, pixel in zip(mean.flat, raw_log_scale.flat, pixels.flat, strict=True):
        x = 0.1 + 0.8 * (pixel + 1) / 2
        b = math.exp(-5 + math.log1p(math.exp(raw + 5)))
        distance = abs(math.log(x / (1 - x)) - mu)
        total -= math.log(math.exp(-distance / b) / (2 * b * x * (1 - x)))
    return total / pixels.size


def kl_to_uniform(logits: Array) -> float:
    """Sum over cells of KL(softmax(logits) || uniform), logits (batch, codes, height, width)."""
    codes, total = logits.shape[1], 0.0
    for cell in np.moveaxis(logits, 1, -1).reshape(-1, codes):
        probabilities = np.exp(cell - cell.max())
        probabilities /= probabilities.sum()
        total += sum(q * math.log(q * codes) for q in probabilities if q > 0)
    return total


def loss(maps: Array, logits: Array, pixels: Array, *, beta: float) -> tuple[float, float, float]:
    """Reconstruction, KL and total of a batch, as published: all divided by the pixel values.

    The published total is (sum of -log p over pixel values + beta * sum of KL over cells) divided
    by 256 x 256 x 3, averaged over images.
    """
    reconstruction = negative_log_likelihood(maps[:, :3], maps[:, 3:], pixels)
    kl = kl_to_uniform(logits)
    return reconstruction, kl, reconstruction + beta * kl / pixels.size
