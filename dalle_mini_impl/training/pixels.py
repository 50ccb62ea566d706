"""Training images as bytes in memory, and as the pixels of a batch."""

from jaxtyping import Float, UInt8
from torch import Tensor

from dalle_mini_impl.data.augmentation import shift_images


def to_pixels(
    images: UInt8[Tensor, "batch channels height width"],
) -> Float[Tensor, "batch channels height width"]:
    """Turn bytes into pixels in [-1, 1]."""
    return images.float() / 127.5 - 1


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
    return to_pixels(images)
