"""Images with classes: scikit-learn's handwritten digits, or any attribute of captioned images.

Digits: 1,797 gray images of 8 x 8 from the UCI repository (Alpaydin & Kaynak 1998), part of
scikit-learn, nothing is downloaded. Of both kinds a fixed fraction is held out by a hash; images
that are variants of one thing, such as an emoji in all its skin tones, stay on one side.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from dalle_mini_impl.data.loading import load_all_pixels
from dalle_mini_impl.data.pairs import Pair, open_pairs
from dalle_mini_impl.data.splits import stable_hash
from dalle_mini_impl.errors import UserError

DIGITS = "digits"


@dataclass(frozen=True)
class LabelledImages:
    """Images in memory, with their classes."""

    pixels: UInt8[Tensor, "samples channels height width"]
    labels: Int64[Tensor, " samples"]
    families: tuple[str, ...]
    """Images of one family show variants of one thing."""


@dataclass(frozen=True)
class LabelledSplits:
    """What is learned, what is measured, and what the classes are called."""

    train: LabelledImages
    held_out: LabelledImages
    class_names: tuple[str, ...]


def load_digits(*, held_out_percent: int) -> LabelledSplits:
    """Read scikit-learn's digits; ``held_out_percent`` is 1 to 50."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError:
        raise UserError("scikit-learn is missing; expected: pip install -e '.[vision]'") from None
    found = load()
    bytes_of = np.rint(found.images * (255 / 16)).astype(np.uint8)  # its gray levels are 0 to 16
    families = [f"{number}" for number in range(len(bytes_of))]
    labels = torch.from_numpy(found.target).long()
    names = tuple(str(name) for name in found.target_names)
    pixels = torch.from_numpy(bytes_of).unsqueeze(1)
    return _split(pixels, labels, families, names, held_out_percent)


def load_labelled_images(
    source: str,
    *,
    label: str,
    families: Sequence[str],
    image_size: int,
    held_out_percent: int,
) -> LabelledSplits:
    """Read captioned images of all splits, and take an attribute as their class.

    Args:
        source: As ``open_pairs`` takes it.
        label: Attribute that names the class, such as ``group`` of the emoji.
        families: Attributes of which the first one that is given names the family; an image without
            any is a family of its own.
        image_size: Side of the square images in pixels.
        held_out_percent: Percentage of the families to hold out, 1 to 50.
    """
    pairs = open_pairs(source)
    pixels, kept, _ = load_all_pixels(pairs, pixel_size=(image_size, image_size))
    chosen = [
        (place, pair)
        for place, pair in enumerate(pairs[index] for index in kept)
        if pair.attributes.get(label)
    ]
    if not chosen:
        known = sorted({name for pair in pairs for name in pair.attributes})
        raise UserError(
            f"data.label: no image has the attribute {label!r}; expected one of "
            f"{', '.join(known) or 'none: this source has no attributes'}"
        )
    # Classes in alphabetical order, so that their numbers are the same at every start.
    values = [str(pair.attributes[label]) for _, pair in chosen]
    names = tuple(sorted(set(values)))
    labels = torch.tensor([names.index(value) for value in values])
    return _split(
        pixels[torch.tensor([place for place, _ in chosen])],
        labels,
        [_family(pair, families) for _, pair in chosen],
        names,
        held_out_percent,
    )


def _family(pair: Pair, attributes: Sequence[str]) -> str:
    given = [str(pair.attributes[name]) for name in attributes if pair.attributes.get(name)]
    return given[0] if given else pair.path


def _split(
    pixels: Tensor,
    labels: Tensor,
    families: Sequence[str],
    names: tuple[str, ...],
    held_out_percent: int,
) -> LabelledSplits:
    # "picture" is a part of the key: another word would hold out other images.
    is_held_out = torch.tensor(
        [stable_hash("picture", family) % 100 < held_out_percent for family in families]
    )
    if is_held_out.all() or not is_held_out.any():
        raise UserError(
            f"data.held_out_percent: got {held_out_percent}, which leaves {int(is_held_out.sum())} "
            f"of {len(families)} images to measure; expected more images or another percentage"
        )

    def part(chosen: Tensor) -> LabelledImages:
        kept = tuple(families[index] for index in chosen.nonzero().flatten().tolist())
        return LabelledImages(pixels[chosen], labels[chosen], kept)

    return LabelledSplits(part(~is_held_out), part(is_held_out), names)
