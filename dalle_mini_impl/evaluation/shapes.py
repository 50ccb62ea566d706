"""Composition on the shapes world: which facts of a caption a generated image shows, exactly."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from dalle_mini_impl.builtin_datasets.shapes.checker import read_objects
from dalle_mini_impl.builtin_datasets.shapes.facts import Fact, facts_hold, parse_fact
from dalle_mini_impl.data.image_grid import make_grid
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.evaluation.bootstrap import Estimate, bootstrap_mean
from dalle_mini_impl.evaluation.report import CEILING, FLOOR, Section, fraction_table
from dalle_mini_impl.evaluation.samples import Pixels, Samples, derangement, to_images

NUM_SHOWN = 32
WHOLE = "whole caption"
TEXT = (
    "An exact checker says which facts of its caption each generated image shows; a caption is "
    "right if all of its facts hold. `test` has colors and shapes as in training; `test_compose` "
    "has pairs of color and shape that training never showed. Intervals: bootstrap."
)


@dataclass(frozen=True)
class CheckedImages:
    """Which facts of their captions some images show."""

    is_right: tuple[bool, ...]
    """Whether all facts of an image hold."""
    facts: dict[str, tuple[bool, ...]]
    """Whether each fact holds, by what it states: number, color, shape, size, ..."""

    def fractions(self) -> dict[str, Estimate]:
        """Average, for whole captions and for each kind of fact."""
        return {
            WHOLE: bootstrap_mean([float(right) for right in self.is_right]),
            **{
                kind: bootstrap_mean([float(holds) for holds in held])
                for kind, held in sorted(self.facts.items())
            },
        }


def measure_shapes(
    reference: Samples, generated: Mapping[str, Pixels], reconstructions: Pixels, *, seed: int
) -> Section:
    """Check generated images of held-out captions, by split.

    Args:
        reference: The held-out images.
        generated: Sampling method (single, best of N) -> one image per caption.
        reconstructions: Of the held-out images, by the image tokenizer: the ceiling.
        seed: Of the shuffling of the first way's captions: the floor.
    """
    facts = [[parse_fact(line) for line in row["facts"]] for row in reference.rows]
    by_split: dict[str, list[int]] = {}
    for index, row in enumerate(reference.rows):
        by_split.setdefault(row["split"], []).append(index)
    figures: dict[str, dict[str, dict[str, Estimate]]] = {}
    fractions: dict[str, dict[str, Estimate]] = {}
    counts: dict[str, int] = {}
    sheets: dict[str, Image.Image] = {}
    # Split by split: the difference between the splits is what composition costs.
    for split, indices in by_split.items():
        own = [facts[index] for index in indices]
        images = {way: to_images(pixels[indices]) for way, pixels in generated.items()}
        checked = {way: check_images(found, own) for way, found in images.items()}
        first, last = next(iter(images)), list(images)[-1]
        captions = [
            reference.captions[index] if right else f"WRONG: {reference.captions[index]}"
            for index, right in zip(indices, checked[last].is_right, strict=True)
        ]
        sheets[f"samples_{split}"] = make_grid(
            images[last][:NUM_SHOWN], columns=8, captions=captions[:NUM_SHOWN]
        )
        # What the tokenizer loses bounds every way from above, an image of another caption of the
        # same split from below.
        others = [own[index] for index in derangement(len(indices), seed=seed).tolist()]
        checked[CEILING] = check_images(to_images(reconstructions[indices]), own)
        checked[FLOOR] = check_images(images[first], others)
        figures[split] = {way: found.fractions() for way, found in checked.items()}
        for way, estimates in figures[split].items():
            fractions[f"{way}, {split}"] = estimates
            counts[f"{way}, {split}"] = len(indices)
    table = fraction_table("facts", "generated", fractions, counts)
    return Section("Composition", TEXT, figures, [table], sheets)


def check_images(images: Sequence[Image.Image], facts: Sequence[Sequence[Fact]]) -> CheckedImages:
    """Check square images of side 32 or more against the facts of their captions.

    Raises:
        UserError: If there are none, or not one list of facts per image.
    """
    if len(images) != len(facts) or not images:
        raise UserError(
            f"images: got {len(images)}, expected one for each of {len(facts)} captions"
        )
    is_right: list[bool] = []
    by_kind: dict[str, list[bool]] = {}
    for image, stated in zip(images, facts, strict=True):
        # The checker reads the objects from the pixels alone; it knows nothing of the caption.
        held = facts_hold(stated, read_objects(image))
        is_right.append(all(held))
        for fact, holds in zip(stated, held, strict=True):
            by_kind.setdefault(kind_of(fact), []).append(holds)
    return CheckedImages(tuple(is_right), {kind: tuple(held) for kind, held in by_kind.items()})


def kind_of(fact: Fact) -> str:
    """Name what a fact states: one attribute, an object, how many, where, or a relation."""
    if fact.kind != "count":
        return fact.kind
    # "there are two red discs" counts objects of some attributes: one of them is named by itself
    stated = [name for name in ("color", "shape", "size") if getattr(fact.subject, name)]
    if len(stated) == 1:
        return stated[0]
    return "object" if stated else "number"
