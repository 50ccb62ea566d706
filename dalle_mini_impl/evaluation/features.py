"""What pictures are compared by: colours and contrasts at several scales, without any weights.

A picture becomes its Laplacian pyramid (Burt and Adelson 1983; as a measure of generated pictures:
Karras et al. 2018, arXiv:1710.10196, section 5, who take patches where we take cells): the colours
of its 8 x 8 version, and the root mean square of every finer band in each cell of an 8 x 8 grid.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from dalle_mini_impl.evaluation.samples import BATCH_SIZE, Pixels, to_floats

GRID = 8  # cells along each side


class FeatureSpace:
    """Features whose parts weigh the same in a set of reference pictures."""

    def __init__(self, reference: Pixels) -> None:
        """Measure how much each part varies.

        Args:
            reference: True pictures, at least two different ones.
        """
        parts = _all_parts(reference)
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
        parts = _all_parts(pixels)
        scaled = [part / scale for part, scale in zip(parts, self._scales, strict=True)]
        return torch.cat(scaled, dim=1)


def _all_parts(pixels: Pixels) -> list[Tensor]:
    """Colours and contrasts of all pictures: each (samples, 3 * 8 * 8)."""
    batches = [_parts(to_floats(part)) for part in pixels.split(BATCH_SIZE)]
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def _parts(pixels: Float[Tensor, "batch 3 height width"]) -> list[Tensor]:
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
