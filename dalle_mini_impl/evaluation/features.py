"""What pictures are compared by: colours and contrasts without any weights, or a network.

Without a network, a picture becomes its Laplacian pyramid (Burt and Adelson 1983; as a measure of
generated pictures: Karras et al. 2018, arXiv:1710.10196, section 5, who take patches where we take
cells): the colours of its 8 x 8 version, and the root mean square of every finer band in each cell
of an 8 x 8 grid. With one, it becomes the means and deviations of the channels of
EfficientNet-Lite0, which was trained on photographs.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from dalle_mini_impl.evaluation.samples import BATCH_SIZE, Pixels, to_floats
from vqvae.losses.perceptual import PerceptualDistance

GRID = 8  # cells along each side
Describe = Callable[[Float[Tensor, "batch 3 height width"]], list[Tensor]]


class FeatureSpace:
    """Features whose parts weigh the same in a set of reference pictures."""

    def __init__(self, reference: Pixels, *, describe: Describe | None = None) -> None:
        """Measure how much each part varies.

        Args:
            reference: True pictures, at least two different ones.
            describe: What makes parts, each (batch, features), of pictures with pixels in [-1, 1];
                colours and contrasts when None.
        """
        self._describe = describe or colours_and_contrasts
        parts = self._parts(reference)
        self._scales = [
            (part - part.mean(dim=0)).square().sum(dim=1).mean().sqrt().clamp(min=1e-6)
            for part in parts
        ]

    def __call__(self, pixels: Pixels) -> Float[Tensor, "samples features"]:
        """Describe pictures.

        Args:
            pixels: Bytes, at least 8 x 8.

        Returns:
            Features; their squared distances add up over the parts.
        """
        parts = self._parts(pixels)
        scaled = [part / scale for part, scale in zip(parts, self._scales, strict=True)]
        return torch.cat(scaled, dim=1)

    @torch.inference_mode()
    def _parts(self, pixels: Pixels) -> list[Tensor]:
        batches = [self._describe(to_floats(part)) for part in pixels.split(BATCH_SIZE)]
        return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def colours_and_contrasts(pixels: Float[Tensor, "batch 3 height width"]) -> list[Tensor]:
    """Describe pictures by their Laplacian pyramids.

    Args:
        pixels: In [-1, 1], at least 8 x 8.

    Returns:
        The colours, and the contrasts of each finer band: each (batch, 3 * 8 * 8).
    """
    side = GRID
    while 2 * side <= min(pixels.shape[2:]):
        side *= 2
    level = F.adaptive_avg_pool2d(pixels, side)
    parts = []
    while side > GRID:
        coarse = F.avg_pool2d(level, 2)
        band = level - F.interpolate(coarse, scale_factor=2.0, mode="nearest")
        parts.append(F.adaptive_avg_pool2d(band.square(), GRID).sqrt().flatten(1))
        level, side = coarse, side // 2
    return [level.flatten(1), *parts]


def network_or_none() -> Describe | None:
    """Load EfficientNet-Lite0, if the package of its weights is installed (extra ``eval``).

    Returns:
        What describes pictures by the means and deviations of its channels at four sizes.
    """
    try:
        network = PerceptualDistance()
    except ValueError:
        return None

    def describe(pixels: Float[Tensor, "batch 3 height width"]) -> list[Tensor]:
        stages = [stage.flatten(2) for stage in network.features(pixels)]
        return [torch.cat([each.mean(2), each.std(2, unbiased=False)], dim=1) for each in stages]

    return describe
