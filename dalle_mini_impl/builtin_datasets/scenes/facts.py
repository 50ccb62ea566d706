"""Facts: machine-readable claims about the images of scenes.

``facts_hold`` is the one place that says what a fact means. It judges the scene itself and what a
checker has read from an image alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dalle_mini_impl.builtin_datasets.scenes.colors import COLORS
from dalle_mini_impl.builtin_datasets.scenes.scene import (
    DIRECTIONS,
    SIZES,
    Background,
    SceneObject,
    all_backgrounds,
)
from dalle_mini_impl.builtin_datasets.scenes.things import all_things
from dalle_mini_impl.errors import UserError

# How much further left, right, up or down a center must lie, in fractions of the image side.
DIRECTION_MARGIN = 0.1
# How many times as large the bigger of two things must be.
SIZE_RATIO = 1.2
_SIZE_WORDS = ("small", "large")


@dataclass(frozen=True)
class ObjectPattern:
    """Which objects a fact is about; a field that is None matches everything."""

    size: str | None = None
    """"small" or "large"."""
    color: str | None = None
    """One of ``COLORS``."""
    thing: str | None = None
    """Name of a ``Thing``."""

    def __str__(self) -> str:
        """Write the pattern in words: "small red cat", "red", "any"."""
        return " ".join(filter(None, (self.size, self.color, self.thing))) or "any"

    def matches(self, item: SceneObject) -> bool:
        """Tell whether an object has all attributes that the pattern names."""
        return (
            self.size in (None, item.size)
            and self.color in (None, item.color)
            and self.thing in (None, item.thing)
        )


@dataclass(frozen=True)
class Fact:
    """One claim about an image. ``str`` and ``parse_fact`` turn it into a line of text and back.

    * "count": exactly ``value`` objects match ``subject``. ``ObjectPattern()`` counts all objects.
    * "relation": an object that matches ``subject`` is ``value`` ("left of", "bigger than", ...)
      another that matches ``reference``.
    * "background": the background is ``value``, names of colors or of a ground.
    """

    kind: str
    value: int | str
    subject: ObjectPattern = ObjectPattern()
    reference: ObjectPattern | None = None

    def __str__(self) -> str:
        """Write the fact as a line, such as "count | red cat | 2" or "background | yellow"."""
        if self.kind == "background":
            return f"background | {self.value}"
        parts = [self.kind, str(self.subject), str(self.value)]
        return " | ".join(parts if self.reference is None else [*parts, str(self.reference)])

    @property
    def topic(self) -> str:
        """What the fact states: "color", "thing", "object", "number", "size", ..."""
        if self.kind == "relation":
            return "position" if self.value in DIRECTIONS else "size"
        if self.kind == "background":
            return "background"
        stated = [name for name in ("thing", "color", "size") if getattr(self.subject, name)]
        return stated[0] if len(stated) == 1 else "object" if stated else "number"


def facts_hold(
    facts: Sequence[Fact], objects: Sequence[SceneObject], background: Background | None
) -> tuple[bool, ...]:
    """Tell of each fact whether it is true of an image that holds ``objects`` and nothing else."""
    return tuple(_fact_holds(fact, objects, background) for fact in facts)


def parse_fact(line: str) -> Fact:
    """Read a fact from the line of text that ``str(fact)`` makes; UserError if it is none."""
    match line.split(" | "):
        case ["background", names] if names in _background_names():
            return Fact("background", names)
        case ["count", subject, number] if number.isdecimal():
            return Fact("count", int(number), _parse_pattern(subject))
        case ["relation", subject, relation, reference] if relation in (*DIRECTIONS, *SIZES):
            return Fact("relation", relation, _parse_pattern(subject), _parse_pattern(reference))
    raise UserError(f"fact: got {line!r}, expected a line like 'count | red cat | 2'")


def background_name(background: Background) -> str:
    """Write a background as a fact does: "yellow", "red to blue", "grass"."""
    return " to ".join(background.names)


def _background_names() -> set[str]:
    return {background_name(background) for background in all_backgrounds()}


def _parse_pattern(words: str) -> ObjectPattern:
    """Read "small red cat" or "any"."""
    if words == "any":
        return ObjectPattern()
    rest: str | None = words
    found: dict[str, str | None] = {"size": None, "color": None}
    for name, choices in (("size", _SIZE_WORDS), ("color", tuple(COLORS))):
        first, _, others = (rest or "").partition(" ")
        if first in choices:
            found[name], rest = first, others or None
    if rest is not None and rest not in all_things():
        raise UserError(f"pattern: got {words!r}, expected size, color and thing, or 'any'")
    return ObjectPattern(found["size"], found["color"], rest)


def _fact_holds(fact: Fact, objects: Sequence[SceneObject], background: Background | None) -> bool:
    if fact.kind == "background":
        return background is not None and background_name(background) == fact.value
    subjects = [item for item in objects if fact.subject.matches(item)]
    if fact.kind == "count":
        return len(subjects) == fact.value
    if fact.kind != "relation" or fact.reference is None:
        raise UserError(f"fact: got {fact!r}, expected a count, a relation or a background")
    # Any subject against any reference: the counts beside this fact make them unique.
    references = [item for item in objects if fact.reference.matches(item)]
    return any(
        _relation_holds(a, str(fact.value), b) for a in subjects for b in references if a is not b
    )


def _relation_holds(a: SceneObject, relation: str, b: SceneObject) -> bool:
    if relation in SIZES:
        ratio = a.side / b.side
        return (ratio if relation == "bigger than" else 1 / ratio) >= SIZE_RATIO
    dx, dy = DIRECTIONS[relation]
    along = dx * (a.center[0] - b.center[0]) + dy * (a.center[1] - b.center[1])
    return along >= DIRECTION_MARGIN
