"""Shifted and enlarged views of training images."""

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from dalle_mini_impl.data.images import bytes_to_pixels


def shift_images(
    pixels: UInt8[Tensor, "batch channels height width"], offsets: Int[Tensor, "batch 2"]
) -> UInt8[Tensor, "batch channels height width"]:
    """Move images by whole pixels (down, right); edges are repeated into the space that opens."""
    _, _, height, width = pixels.shape
    # Where each pixel comes from; clamping repeats the edge.
    rows = (torch.arange(height) - offsets[:, :1]).clamp(0, height - 1)  # (batch, height)
    columns = (torch.arange(width) - offsets[:, 1:]).clamp(0, width - 1)
    batch = torch.arange(len(pixels))[:, None, None]
    # (batch, height, width, channels): advanced indexing of both axes at once
    moved = pixels.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()


def zoom_images(
    pixels: UInt8[Tensor, "batch channels height width"],
    uniforms: Float[Tensor, "batch 3"],
    *,
    max_zoom: float,
) -> UInt8[Tensor, "batch channels height width"]:
    """Enlarge images up to ``max_zoom`` and keep a window of the old size from each.

    ``uniforms`` in [0, 1) say how much each grows and where its window is, (down, right).

    Source: Ramesh et al. 2021, arXiv:2102.12092, listing 2, where ``max_zoom`` is 9/8. There the
        image is scaled down to its new size and cropped to a square near its middle; here the
        crop is the middle one, and an image at its final size is enlarged (bilinear).
    """
    height, width = pixels.shape[-2:]
    results = []
    for image, (growth, down, right) in zip(pixels, uniforms.tolist(), strict=True):
        # Every whole number of pixels between no growth and the largest is as likely.
        sides = [
            size + int(growth * (round(max_zoom * size) - size + 1)) for size in image.shape[1:]
        ]
        top, left = int(down * (sides[0] - height + 1)), int(right * (sides[1] - width + 1))
        # One by one, since each image grows to its own size.
        large = F.interpolate(image[None].float(), size=sides, mode="bilinear")
        results.append(large[0, :, top : top + height, left : left + width].round().byte())
    return torch.stack(results)


def shifted_pixels(
    images: UInt8[Tensor, "batch channels height width"],
    uniforms: Float[Tensor, "batch 2"],
    *,
    max_shift: int,
) -> Float[Tensor, "batch channels height width"]:
    """Move images by up to ``max_shift`` pixels and return pixels in [-1, 1].

    ``uniforms`` in [0, 1) decide how far down and right; 0.5 is not at all.
    """
    if max_shift:
        num_places = 2 * max_shift + 1
        images = shift_images(images, (uniforms * num_places).long() - max_shift)
    return bytes_to_pixels(images)
