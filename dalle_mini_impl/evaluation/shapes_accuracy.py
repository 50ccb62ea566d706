"""How many captions of the shapes world a model draws right, by the exact checker."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from dalle_mini_impl.data.images import make_grid
from dalle_mini_impl.data.shapes import make_scene
from dalle_mini_impl.data.shapes_captions import Caption, describe_scene
from dalle_mini_impl.data.shapes_checker import read_objects
from dalle_mini_impl.data.shapes_facts import Fact, facts_hold
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.pipeline import TextToImagePipeline
from dalle_mini_impl.sampling.generate import ROWS_PER_BATCH

FIRST_FRESH_SEED = 10_000_000
"""Scenes from this seed on are in no data set: ``prepare_shapes`` counts from 0."""


@dataclass(frozen=True)
class ShapesReport:
    """Drawings of fresh captions and how many are right."""

    accuracy: float
    """Share of drawings of which every fact of their caption holds."""
    fact_accuracies: dict[str, float]
    """Share of facts that hold, by what they state: number, colour, shape, size, ..."""
    shuffled_accuracy: float
    """Share of drawings that are right for the caption after their own: chance, by the checker."""
    num_captions: int
    captions: tuple[str, ...]
    images: tuple[Image.Image, ...]
    """The drawing of each caption."""
    is_right: tuple[bool, ...]
    """Whether it is right."""


def evaluate_shapes(
    pipeline: TextToImagePipeline,
    *,
    split: str,
    num_captions: int,
    seed: int,
    kinds: Sequence[str] = ("single",),
    **settings: Any,
) -> ShapesReport:
    """Draw captions of scenes that no data set holds, one picture each, and check the pictures.

    Args:
        pipeline: The model.
        split: ``test`` (as in training) or ``test_compose`` (colour and shape never met together).
        num_captions: How many, at least 2.
        seed: Decides the scenes and the drawings.
        kinds: Kinds of scene, see ``make_scene``; those that the model was trained on.
        **settings: Passed on to the pipeline, such as ``temperature`` or ``num_candidates``.

    Returns:
        Shares of right drawings, and the drawings.

    Raises:
        UserError: If the split, a kind, the number or a setting is out of range.
    """
    if num_captions < 2:
        raise UserError(f"num_captions: got {num_captions}, want at least 2")
    first = FIRST_FRESH_SEED + seed * num_captions
    captions = [
        describe_scene(make_scene(first + index, split=split, kinds=kinds))
        for index in range(num_captions)
    ]
    images = []
    for start in range(0, num_captions, ROWS_PER_BATCH):  # a seed of its own for every batch
        prompts = [caption.text for caption in captions[start : start + ROWS_PER_BATCH]]
        images += pipeline(prompts, num_images=1, seed=seed + start, **settings).images
    return score_drawings(images, captions)


def score_drawings(images: Sequence[Image.Image], captions: Sequence[Caption]) -> ShapesReport:
    """Check pictures against their captions.

    Args:
        images: Square pictures of side 32 or more.
        captions: What each should show.

    Returns:
        Shares of right pictures, and the pictures.

    Raises:
        UserError: If there are fewer than two, or not one picture per caption.
    """
    if len(images) != len(captions) or len(images) < 2:
        raise UserError(f"images: got {len(images)} for {len(captions)} captions, want 2 or more")
    held_by_kind = defaultdict[str, list[bool]](list)
    is_right, is_right_shuffled = [], []
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        objects = read_objects(image)
        held = facts_hold(caption.facts, objects)
        for fact, holds in zip(caption.facts, held, strict=True):
            held_by_kind[_stated_by(fact)].append(holds)
        is_right.append(all(held))
        other = captions[(index + 1) % len(captions)]
        is_right_shuffled.append(all(facts_hold(other.facts, objects)))
    return ShapesReport(
        accuracy=_share(is_right),
        fact_accuracies={kind: _share(held) for kind, held in held_by_kind.items()},
        shuffled_accuracy=_share(is_right_shuffled),
        num_captions=len(captions),
        captions=tuple(caption.text for caption in captions),
        images=tuple(images),
        is_right=tuple(is_right),
    )


def drawings_sheet(report: ShapesReport, num_shown: int) -> Image.Image:
    """Lay drawings out with their captions; what is wrong is marked.

    Args:
        report: Of ``evaluate_shapes``.
        num_shown: At most this many, the first ones.

    Returns:
        One picture.
    """
    captions = [
        caption if right else f"WRONG: {caption}"
        for caption, right in zip(report.captions, report.is_right, strict=True)
    ]
    return make_grid(report.images[:num_shown], columns=8, captions=captions[:num_shown])


def _stated_by(fact: Fact) -> str:
    """Names what a fact states: one attribute, an object, how many, where, or a relation."""
    if fact.kind != "count":
        return fact.kind
    stated = [name for name in ("colour", "shape", "size") if getattr(fact.subject, name)]
    return "number" if not stated else stated[0] if len(stated) == 1 else "object"


def _share(held: Sequence[bool]) -> float:
    return sum(held) / len(held)
