"""Facts: machine-readable claims about the images of scenes.

``facts_hold`` is the one place that says what a fact means. It judges the objects of a scene and
the objects that a checker has read from an image alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dalle_mini_impl.builtin_datasets.shapes.scene import (
    COLORS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    ShapeObject,
)
from dalle_mini_impl.errors import UserError

# How much further left, right, up or down a center must lie, in fractions of the image side.
RELATION_MARGIN = 0.1
# Centers below the first are left or top, above the second right or bottom, else central.
POSITION_BORDERS = (0.4, 0.6)


@dataclass(frozen=True)
class ObjectPattern:
    """Which objects a fact is about; a field that is None matches everything."""

    size: str | None = None
    """One of ``SIZES``."""
    color: str | None = None
    """One of ``COLORS``."""
    shape: str | None = None
    """One of ``SHAPES``."""

    def __str__(self) -> str:
        """Write the pattern in words: "small red circle", "red", "any"."""
        return " ".join(w for w in (self.size, self.color, self.shape) if w is not None) or "any"

    def matches(self, item: ShapeObject) -> bool:
        """Tell whether an object has all attributes that the pattern names."""
        return (
            self.size in (None, item.size)
            and self.color in (None, item.color)
            and self.shape in (None, item.shape)
        )


@dataclass(frozen=True)
class Fact:
    """One claim about an image. ``str`` and ``parse_fact`` turn it into a line of text and back.

    * "count": exactly ``value`` objects match ``subject``. ``ObjectPattern()`` counts all objects.
    * "position": an object that matches ``subject`` has its center in cell ``value`` of a 3 x 3
      grid.
    * "relation": an object that matches ``subject`` is ``value`` ("left of", ...) another that
      matches ``reference``.
    """

    kind: str
    """"count", "position" or "relation"."""
    subject: ObjectPattern
    """What the claim is about."""
    value: int | str
    """A count, one of ``POSITIONS`` or one of ``RELATIONS``."""
    reference: ObjectPattern | None = None
    """For "relation": the object that the subject is compared to."""

    def __str__(self) -> str:
        """Write the fact as a line: "count | red circle | 2" or "relation | red | above | star"."""
        parts = [self.kind, str(self.subject), str(self.value)]
        return " | ".join(parts if self.reference is None else [*parts, str(self.reference)])


def facts_hold(facts: Sequence[Fact], objects: Sequence[ShapeObject]) -> tuple[bool, ...]:
    """Tell of each fact whether it is true of ``objects``, which are all that the image holds.

    Raises UserError if a fact is malformed.
    """
    return tuple(_fact_holds(fact, objects) for fact in facts)


def parse_fact(line: str) -> Fact:
    """Read a fact from the line of text that ``str(fact)`` makes; UserError if it is none."""
    kind, *rest = line.split(" | ")
    match kind, rest:
        case "count", [subject, number] if number.isdecimal():
            return Fact(kind, _parse_pattern(subject), int(number))
        case "position", [subject, position] if position in POSITIONS:
            return Fact(kind, _parse_pattern(subject), position)
        case "relation", [subject, relation, reference] if relation in RELATIONS:
            return Fact(kind, _parse_pattern(subject), relation, _parse_pattern(reference))
    raise UserError(f"fact: got {line!r}, expected a line like 'count | red circle | 2'")


def _parse_pattern(words: str) -> ObjectPattern:
    """Read "small red circle" or "any"."""
    # Find the words in any order, then insist on ours: str() must give the line back.
    named = words.split(" ")
    pattern = ObjectPattern(
        next((w for w in named if w in SIZES), None),
        next((w for w in named if w in COLORS), None),
        next((w for w in named if w in SHAPES), None),
    )
    if str(pattern) != words:
        raise UserError(f"pattern: got {words!r}, expected size, color and shape names, or 'any'")
    return pattern


def _fact_holds(fact: Fact, objects: Sequence[ShapeObject]) -> bool:
    subjects = [item for item in objects if fact.subject.matches(item)]
    if fact.kind == "count":
        return len(subjects) == fact.value
    if fact.kind == "position":
        return any(_position_of(item) == fact.value for item in subjects)
    # Any subject against any reference: the counts beside this fact make them unique.
    if fact.kind == "relation" and fact.reference is not None and fact.value in RELATIONS:
        # How far subject lies from reference along the direction of the relation.
        dx, dy = RELATIONS[str(fact.value)]
        return any(
            dx * (a.center[0] - b.center[0]) + dy * (a.center[1] - b.center[1]) >= RELATION_MARGIN
            for a in subjects
            for b in objects
            if fact.reference.matches(b)
        )
    raise UserError(
        f"fact: got {fact!r}, expected a count, a position or a relation with a reference"
    )


def _position_of(item: ShapeObject) -> str:
    """Name the cell of the 3 x 3 grid that holds the object's center."""
    low, high = POSITION_BORDERS
    column, row = [0 if v < low else 2 if v > high else 1 for v in item.center]
    return list(POSITIONS)[3 * row + column]  # POSITIONS runs row by row
