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
    conditional logits, 0.0 ignores the caption, more trades variety for fidelity. Both logits are
    of the same positions, given the caption and given the null caption.

    Source: Ho & Salimans 2022, arXiv:2207.12598 (their w equals guidance_scale - 1).
    """
    # A tensor is not checked: reading it would make the host wait for the device.
    if not isinstance(guidance_scale, Tensor) and not 0 <= guidance_scale < math.inf:
        raise ValueError(f"guidance_scale: got {guidance_scale}, expected at least 0 (1.0 = off)")
    return unconditional_logits + guidance_scale * (conditional_logits - unconditional_logits)


def scale_at(
    step: int, num_steps: int, *, guidance_scale: float, schedule: GuidanceSchedule
) -> float:
    """Compute the guidance scale of token ``step`` of ``num_steps``.

    ``cosine`` starts without guidance and reaches the full scale at the last token: the first
    tokens, which decide the image, keep their variety, and the flat first rows of an image are
    not pushed into saturated colors.

    Source: the power-cosine schedule of Yu et al. 2024, arXiv:2411.00776 (RAR), with power 2.
    """
    if schedule == "constant":
        return guidance_scale
    fraction = ((step + 1) / num_steps) ** 2.0
    return 1 + (guidance_scale - 1) * (1 - math.cos(math.pi * fraction)) / 2
