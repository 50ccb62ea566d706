"""Composition on a world with a checker: which facts of a caption an image shows, exactly."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image

from dalle_mini_impl.data.image_grid import make_grid
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.evaluation.bootstrap import Estimate, bootstrap_mean
from dalle_mini_impl.evaluation.report import CEILING, FLOOR, Section, fraction_table
from dalle_mini_impl.evaluation.samples import Pixels, Row, Samples, derangement, to_images

NUM_SHOWN = 32
WHOLE = "whole caption"
INTERVALS = "a caption is right if all of its facts hold. Intervals: bootstrap."


class World(NamedTuple):
    """A built-in data set whose images can be read back."""

    text: str
    """What the report says of it."""
    read: Callable[[Image.Image, Row], Any]
    """Read what an image holds; of the row, only how the image was to look, not its facts."""
    judge: Callable[[Sequence[str], Any], list[tuple[str, bool]]]
    """Tell of each fact, a line of text, what it states (number, color, ...) and whether it holds
    of what was read."""


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


def measure_facts(
    world: World,
    reference: Samples,
    generated: Mapping[str, Pixels],
    reconstructions: Pixels,
    *,
    seed: int,
) -> Section:
    """Check generated images of held-out captions, by split.

    Args:
        world: The built-in data set.
        reference: Its held-out images.
        generated: Sampling method (single, best of N) -> one image per caption.
        reconstructions: Of the held-out images, by the image tokenizer: the ceiling.
        seed: Of the shuffling of the first way's captions: the floor.
    """
    by_split: dict[str, list[int]] = {}
    for index, row in enumerate(reference.rows):
        by_split.setdefault(row["split"], []).append(index)
    figures: dict[str, dict[str, dict[str, Estimate]]] = {}
    fractions: dict[str, dict[str, Estimate]] = {}
    counts: dict[str, int] = {}
    sheets: dict[str, Image.Image] = {}
    # Split by split: the difference between the splits is what composition costs.
    for split, indices in by_split.items():
        rows = [reference.rows[index] for index in indices]
        images = {way: to_images(pixels[indices]) for way, pixels in generated.items()}
        readings = {way: _read_images(world, found, rows) for way, found in images.items()}
        checked = {way: _judge(world, found, rows) for way, found in readings.items()}
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
        others = [rows[index] for index in derangement(len(indices), seed=seed).tolist()]
        checked[CEILING] = check_images(world, to_images(reconstructions[indices]), rows)
        checked[FLOOR] = _judge(world, readings[first], others)
        figures[split] = {way: found.fractions() for way, found in checked.items()}
        for way, estimates in figures[split].items():
            fractions[f"{way}, {split}"] = estimates
            counts[f"{way}, {split}"] = len(indices)
    table = fraction_table("facts", "generated", fractions, counts)
    return Section("Composition", world.text, figures, [table], sheets)


def check_images(world: World, images: Sequence[Image.Image], rows: Sequence[Row]) -> CheckedImages:
    """Check images against the facts of their rows of metadata.

    Raises:
        UserError: If there are none, or not one row per image.
    """
    if len(images) != len(rows) or not images:
        raise UserError(f"images: got {len(images)}, expected one for each of {len(rows)} captions")
    return _judge(world, _read_images(world, images, rows), rows)


def _read_images(world: World, images: Sequence[Image.Image], rows: Sequence[Row]) -> list[Any]:
    return [world.read(image, row) for image, row in zip(images, rows, strict=True)]


def _judge(world: World, readings: Sequence[Any], rows: Sequence[Row]) -> CheckedImages:
    is_right: list[bool] = []
    by_topic: dict[str, list[bool]] = {}
    for reading, row in zip(readings, rows, strict=True):
        judged = world.judge(row["facts"], reading)
        is_right.append(all(holds for _, holds in judged))
        for topic, holds in judged:
            by_topic.setdefault(topic, []).append(holds)
    return CheckedImages(tuple(is_right), {topic: tuple(held) for topic, held in by_topic.items()})
