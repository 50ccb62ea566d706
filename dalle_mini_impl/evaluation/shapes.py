"""How many captions of the shapes world a model generates right, by the exact checker."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from dalle_mini_impl.builtin_datasets.shapes.checker import read_objects
from dalle_mini_impl.builtin_datasets.shapes.facts import Fact, facts_hold, parse_fact
from dalle_mini_impl.data.image_grid import make_grid
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.evaluation.bootstrap import Estimate, bootstrap_mean
from dalle_mini_impl.evaluation.likelihood import shuffled
from dalle_mini_impl.evaluation.report import CEILING, FLOOR, Section, fraction_table
from dalle_mini_impl.evaluation.samples import Pixels, Samples, to_images

NUM_SHOWN = 32
WHOLE = "whole caption"


@dataclass(frozen=True)
class Checked:
    """Images and which of their captions' facts hold."""

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


def check_images(images: Sequence[Image.Image], facts: Sequence[Sequence[Fact]]) -> Checked:
    """Check images against their captions.

    Args:
        images: Square images of side 32 or more.
        facts: What each should show.

    Returns:
        What holds.

    Raises:
        UserError: If there are none, or not one list of facts per image.
    """
    if len(images) != len(facts) or not images:
        raise UserError(f"images: got {len(images)} for {len(facts)} captions, want one each")
    is_right: list[bool] = []
    by_kind: dict[str, list[bool]] = {}
    for image, expected in zip(images, facts, strict=True):
        held = facts_hold(expected, read_objects(image))
        is_right.append(all(held))
        for fact, holds in zip(expected, held, strict=True):
            by_kind.setdefault(stated_by(fact), []).append(holds)
    return Checked(tuple(is_right), {kind: tuple(held) for kind, held in by_kind.items()})


def stated_by(fact: Fact) -> str:
    """Name what a fact states: one attribute, an object, how many, where, or a relation.

    Args:
        fact: Any.

    Returns:
        Such as ``color``.
    """
    if fact.kind != "count":
        return fact.kind
    stated = [name for name in ("color", "shape", "size") if getattr(fact.subject, name)]
    return "number" if not stated else stated[0] if len(stated) == 1 else "object"


def facts_of(samples: Samples) -> list[list[Fact]]:
    """Read what ``prepare_shapes`` wrote beside each image.

    Args:
        samples: Of the shapes world.

    Returns:
        The facts of each image.
    """
    return [[parse_fact(line) for line in row["facts"]] for row in samples.rows]


def measure_shapes(
    expected: Samples, generated: Mapping[str, Pixels], reconstructions: Pixels, *, seed: int
) -> Section:
    """Check generated images of captions whose images were held out.

    Args:
        expected: The true images of the captions.
        generated: Way of generation -> one generation per caption; the first way is also shuffled.
        reconstructions: The true images after the image tokenizer: the best that can be generated.
        seed: Of the shuffling.

    Returns:
        Fractions of captions and facts that hold, by split, with ceiling and floor.
    """
    facts, splits = facts_of(expected), [row["split"] for row in expected.rows]
    figures: dict[str, dict[str, dict[str, Estimate]]] = {}
    counts: dict[str, int] = {}
    sheets: dict[str, Image.Image] = {}
    for split in dict.fromkeys(splits):
        places = [at for at, name in enumerate(splits) if name == split]
        own = [facts[at] for at in places]
        checked = {way: check_images(to_images(p[places]), own) for way, p in generated.items()}
        shown = checked[list(generated)[-1]].is_right
        images = to_images(list(generated.values())[-1][places])
        captions = [
            expected.captions[at] if right else f"WRONG: {expected.captions[at]}"
            for at, right in zip(places, shown, strict=True)
        ]
        sheets[f"samples_{split}"] = make_grid(
            images[:NUM_SHOWN], columns=8, captions=captions[:NUM_SHOWN]
        )
        others = [own[at] for at in shuffled(len(places), seed=seed).tolist()]
        first = to_images(next(iter(generated.values()))[places])
        checked[CEILING] = check_images(to_images(reconstructions[places]), own)
        checked[FLOOR] = check_images(first, others)
        figures[split] = {way: found.fractions() for way, found in checked.items()}
        counts |= {f"{way}, {split}": len(places) for way in checked}
    fractions = {
        f"{way}, {split}": found for split in figures for way, found in figures[split].items()
    }
    return Section(
        "Composition",
        "An exact checker reads each generation and says which facts of its caption hold; a caption "
        "is right if all do. `test` has colors and shapes as in training; `test_compose` has "
        "pairs of color and shape that training never showed. Intervals: bootstrap.",
        figures,
        [fraction_table("facts", "generated", fractions, counts)],
        sheets,
    )
