"""Classifier-free guidance: how strongly the caption steers each token."""

import math
from typing import Literal

from jaxtyping import Float
from torch import Tensor

GuidanceSchedule = Literal["constant", "cosine"]


def guide(
    conditional_logits: Float[Tensor, "batch vocab"],
    unconditional_logits: Float[Tensor, "batch vocab"],
    *,
    guidance_scale: float | Float[Tensor, "#batch 1"],
) -> Float[Tensor, "batch vocab"]:
    """Push the next token towards the caption.

    Computes ``unconditional + guidance_scale * (conditional - unconditional)``: 1.0 returns the
    conditional logits, 0.0 ignores the caption, more trades variety for fidelity.

    Args:
        conditional_logits: Given the caption, in nats, not normalised.
        unconditional_logits: Given the null caption, for the same positions.
        guidance_scale: Dimensionless, at least 0; 1.0 is off. A tensor is not checked: to look
            at it would make the device wait.

    Returns:
        A new tensor.

    Raises:
        ValueError: If the scale is negative or not finite.

    Source: Ho & Salimans 2022, arXiv:2207.12598 (their w equals guidance_scale - 1).
    """
    if not isinstance(guidance_scale, Tensor) and not 0 <= guidance_scale < math.inf:
        raise ValueError(f"guidance_scale: got {guidance_scale}, expected at least 0 (1.0 = off)")
    return unconditional_logits + guidance_scale * (conditional_logits - unconditional_logits)


def scale_at(
    step: int,
    num_steps: int,
    *,
    guidance_scale: float,
    schedule: GuidanceSchedule,
    power: float = 2.0,
) -> float:
    """Choose the guidance of one token.

    ``cosine`` starts without guidance and reaches the full scale at the last token: the first
    tokens, which decide the image, keep their variety, and the flat first rows of an image are
    not pushed into saturated colors.

    Args:
        step: Index of the token, from 0.
        num_steps: Tokens per image.
        guidance_scale: The largest scale; 1.0 is off.
        schedule: ``constant`` or ``cosine``.
        power: Larger keeps the guidance low for longer.

    Returns:
        The scale of this token.

    Source: the power-cosine schedule of Yu et al. 2024, arXiv:2411.00776 (RAR).
    """
    if schedule == "constant":
        return guidance_scale
    fraction = ((step + 1) / num_steps) ** power
    return 1 + (guidance_scale - 1) * (1 - math.cos(math.pi * fraction)) / 2
