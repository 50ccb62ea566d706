"""Composition on the shapes world: color, shape, size, number and place, by its checker."""

from collections.abc import Sequence

from dalle_mini_impl.builtin_datasets.shapes.checker import read_objects
from dalle_mini_impl.builtin_datasets.shapes.facts import Fact, facts_hold, parse_fact
from dalle_mini_impl.builtin_datasets.shapes.scene import ShapeObject
from dalle_mini_impl.evaluation.facts import INTERVALS, World


def _judge(lines: Sequence[str], objects: Sequence[ShapeObject]) -> list[tuple[str, bool]]:
    facts = [parse_fact(line) for line in lines]
    return list(zip(map(topic_of, facts), facts_hold(facts, objects), strict=True))


SHAPES = World(
    "An exact checker says which facts of its caption each generated image shows; `test` has "
    "colors and shapes as in training; `test_compose` has pairs of color and shape that training "
    f"never showed; {INTERVALS}",
    # The checker reads the objects from the pixels alone; it knows nothing of the caption.
    lambda image, row: read_objects(image),
    _judge,
)


def topic_of(fact: Fact) -> str:
    """Name what a fact states: one attribute, an object, how many, where, or a relation."""
    if fact.kind != "count":
        return fact.kind
    # "there are two red discs" counts objects of some attributes: one of them is named by itself
    stated = [name for name in ("color", "shape", "size") if getattr(fact.subject, name)]
    if len(stated) == 1:
        return stated[0]
    return "object" if stated else "number"
