"""The logit-Laplace likelihood of pixels (Ramesh et al. 2021, arXiv:2102.12092, appendix A.3)."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

LOGIT_LAPLACE_EPS = 0.1
LOG_SCALE_FLOOR = -5.0


def logit_laplace_loss(
    parameters: Float[Tensor, "batch double_channels height width"],
    pixels: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, ""]:
    """Return the mean negative log-likelihood of pixel values in [-1, 1], in nats.

    Pixels are mapped into [0.1, 0.9]. There the distribution is that of the sigmoid of a Laplace
    variable with mean mu and scale b: unlike a plain Laplace distribution (L1 loss), it has no
    mass outside the range of pixels. ``parameters`` holds the channels of mu, then those of ln b.
    """
    batch, channels, height, width = pixels.shape
    if parameters.shape != (batch, 2 * channels, height, width):
        raise ValueError(
            f"parameters: got shape {tuple(parameters.shape)}, "
            f"expected {(batch, 2 * channels, height, width)} for pixels {tuple(pixels.shape)}"
        )
    mean, raw_log_scale = parameters.float().chunk(2, dim=1)
    # Deviation: a smooth bend keeps ln b above -5, less than an 8-bit step. Flat areas are
    # reconstructed exactly, and the density there would grow without bound.
    log_scale = LOG_SCALE_FLOOR + F.softplus(raw_log_scale - LOG_SCALE_FLOOR)
    unit = to_open_interval(pixels.float())
    # The density of x is that of logit(x) times d logit(x) / dx = 1 / (x (1 - x)).
    log_jacobian = torch.log(unit * (1 - unit))
    distance = (torch.logit(unit) - mean).abs()
    nats = math.log(2) + log_scale + log_jacobian + distance * torch.exp(-log_scale)
    return nats.mean()


def to_open_interval(
    pixels: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, "batch channels height width"]:
    """Map pixels in [-1, 1] into [0.1, 0.9], where logit-Laplace distributions live."""
    return (1 - 2 * LOGIT_LAPLACE_EPS) * (pixels + 1) / 2 + LOGIT_LAPLACE_EPS


def logit_laplace_pixels(
    parameters: Float[Tensor, "batch double_channels height width"],
) -> Float[Tensor, "batch channels height width"]:
    """Return the pixels in [-1, 1] at the centers mu of the distributions."""
    mean, _ = parameters.chunk(2, dim=1)
    unit = (torch.sigmoid(mean) - LOGIT_LAPLACE_EPS) / (1 - 2 * LOGIT_LAPLACE_EPS)
    return unit.clamp(0, 1) * 2 - 1
