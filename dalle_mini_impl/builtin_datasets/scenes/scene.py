"""A procedural world of things: emoji in all colors on simple backgrounds, unlimited and seeded.

A scene is a pure function of (seed, split, styles) and can be rendered at any size from 32 pixels
on. ``captions`` puts it into words, of which parts are left out at random, and ``facts``,
machine-readable claims; ``checker`` verifies such claims on an image alone.

Composition is measured on combinations that ``train`` never shows, though it shows all their parts.
The splits are the six tasks of GenEval (Ghosh et al. 2023, arXiv 2310.11513) and one more:

* ``test_single``: any thing as in training; ``test_words`` the same, by a word never trained on.
* ``test_colors``: things in the one color each that training never gives them.
* ``test_counting``: things in the one number each (two to four) that training never shows.
* ``test_two``, ``test_attribution``: pairs of things that training never shows together;
  the second states a color of each.
* ``test_position``: pairs in one of the relations that training never shows them in.

Coordinates are fractions of the image side: (0, 0) is the top left corner, x runs right, y down.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dalle_mini_impl.builtin_datasets.scenes import DEFAULT_KINDS, KINDS
from dalle_mini_impl.builtin_datasets.scenes.colors import COLORS
from dalle_mini_impl.builtin_datasets.scenes.things import all_things, load_sprites, render_thing
from dalle_mini_impl.data.splits import stable_hash
from dalle_mini_impl.errors import UserError

# The kind of each task's scenes.
TASKS = {
    "single": "single",
    "words": "single",
    "colors": "single",
    "counting": "count",
    "two": "pair",
    "attribution": "pair",
    "position": "pair",
}
SPLITS = ("train", *(f"test_{task}" for task in TASKS))
# Direction (x, y) from the second thing to the first.
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
SIZES = ("bigger than", "smaller than")
# Name -> sky, ground, and the color that a thing on it does not have.
GROUNDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int], str]] = {
    "grass": ((190, 225, 250), (120, 190, 90), "green"),
    "beach": ((165, 215, 250), (235, 210, 150), "yellow"),
    "snow": ((165, 190, 225), (214, 228, 246), "white"),
    "night": ((25, 30, 80), (50, 55, 70), "black"),
    "sea": ((175, 215, 245), (50, 130, 190), "blue"),
}
HORIZON = 5 / 8
MIN_IMAGE_SIZE = 32
# Longer sides of things, as fractions of the image side: alone; several, or beside one of its size;
# beside a smaller or a bigger one.
SINGLE_SIDES, EQUAL_SIDE, UNLIKE_SIDES = (9 / 16, 11 / 16, 13 / 16), 7 / 16, (9 / 16, 5 / 16)
# A thing is small below and large above.
SIZE_BORDER = 10 / 16
# Boxes begin and end on a grid of STEP, MARGIN away from its lines. So the image tokens of a thing
# recur, with 8 of them a side, and a decoder learns in minutes what takes hours with things
# anywhere (docs/log.md).
STEP, MARGIN = 1 / 8, 1 / 32

_TRIES = 1_000


@dataclass(frozen=True)
class SceneObject:
    """One thing of an image, rendered or read back from pixels."""

    thing: str
    """Name of a ``Thing``; "unknown" where a checker could not tell."""
    color: str
    """One of ``COLORS``; "unknown" where a checker could not tell."""
    center: tuple[float, float]
    """(x, y) of the middle of its box, in fractions of the image side."""
    side: float
    """Longer side of its box, as a fraction of the image side."""

    @property
    def size(self) -> str:
        """In words: "small" or "large"."""
        return "small" if self.side < SIZE_BORDER else "large"


@dataclass(frozen=True)
class Background:
    """What is behind the things."""

    kind: str
    """"plain", "gradient" or "ground"."""
    names: tuple[str, ...]
    """One color; two colors, from top to bottom; or one of ``GROUNDS``."""

    @property
    def forbidden_colors(self) -> tuple[str, ...]:
        """Colors that a thing on it does not have, since it could not be seen."""
        return (GROUNDS[self.names[0]][2],) if self.kind == "ground" else self.names

    def render(self, image_size: int) -> NDArray[np.float32]:
        """Render the background alone: (height, width, 3), 0 to 1."""
        rows = (np.arange(image_size) + 0.5) / image_size
        if self.kind == "ground":
            top, bottom = GROUNDS[self.names[0]][:2]
            mix = np.clip((rows - HORIZON) * image_size + 0.5, 0, 1)
        else:
            top, bottom = COLORS[self.names[0]], COLORS[self.names[-1]]
            mix = rows
        column = np.array(top) + mix[:, None] * (np.array(bottom) - np.array(top))
        pixels = np.broadcast_to(column[:, None] / 255, (image_size, image_size, 3))
        return pixels.astype(np.float32)


@dataclass(frozen=True)
class Scene:
    """What an image holds."""

    kind: str
    """"single", "count" or "pair"."""
    split: str
    """One of ``SPLITS``; it decides what the caption mentions."""
    seed: int
    """It also chooses the wording."""
    objects: tuple[SceneObject, ...]
    background: Background
    style: str
    """Of the sprites, as in ``emoji.styles``."""
    relations: tuple[tuple[int, str, int], ...] = ()
    """For "pair": (object index, one of ``DIRECTIONS`` or ``SIZES``, object index)."""


@cache
def all_backgrounds() -> tuple[Background, ...]:
    """List every background: plain ones, gradients between two colors, grounds."""
    plain = [Background("plain", (color,)) for color in COLORS]
    pairs = [(a, b) for a in COLORS for b in COLORS if a != b]
    gradients = [Background("gradient", pair) for pair in pairs]
    return (*plain, *gradients, *(Background("ground", (name,)) for name in GROUNDS))


def held_out_color(thing: str) -> str:
    """Name the color in which training never shows a thing."""
    return list(COLORS)[stable_hash("scenes color", thing) % len(COLORS)]


def held_out_count(thing: str) -> int:
    """Name the number, 2 to 4, in which training never shows a thing."""
    return 2 + stable_hash("scenes count", thing) % 3


def is_held_out_pair(a: str, b: str) -> bool:
    """Tell whether training never shows two things together: one in ten pairs."""
    return stable_hash("scenes pair", *sorted((a, b))) % 10 == 0


def is_held_out_relation(a: str, relation: str, b: str) -> bool:
    """Tell whether training never shows two things in a relation: one in eight."""
    # "a right of b" is "b left of a".
    if relation in ("right of", "below"):
        a, relation, b = b, {"right of": "left of", "below": "above"}[relation], a
    return stable_hash("scenes relation", a, relation, b) % 8 == 0


def make_scene(
    seed: int,
    *,
    split: str,
    kinds: Sequence[str] = DEFAULT_KINDS,
    styles: Sequence[str] = ("twemoji",),
    num_things: int | None = None,
    npm_dir: Path | None = None,
) -> Scene:
    """Make the scene of a seed; the same arguments always give the same scene.

    Args:
        seed: Any integer; each split has random numbers of its own, so seeds may be reused across
            splits.
        split: One of ``SPLITS``.
        kinds: Those that "train" chooses from: one large thing, one of any size, two to four of a
            kind, two different things. Without "single", the splits of one thing show a large one.
        styles: Of the sprites; one of them is chosen.
        num_things: So many of those that a style has, those first that are easiest to tell apart.
            None: all.
        npm_dir: As in ``emoji.styles.images``.
    """
    if split not in SPLITS:
        raise UserError(f"split: got {split!r}, expected one of {SPLITS}")
    if not kinds or not set(kinds) <= set(KINDS):
        raise UserError(f"kinds: got {tuple(kinds)!r}, expected some of {KINDS}")
    # A string seed is stable across Python versions. The order of the calls below is the data set:
    # one number more or less would change every scene.
    rng = random.Random(f"scenes {split} {seed}")
    style = rng.choice(list(styles))
    names = list(load_sprites(style, npm_dir))[:num_things]
    for _ in range(_TRIES):
        kind = rng.choice([kind for kind in KINDS if kind in kinds])
        kind = TASKS.get(split.removeprefix("test_"), kind)
        if kind == "single" and "single" not in kinds and "large" in kinds:
            kind = "large"
        scene = _propose(rng, kind, split, seed, style, names)
        if _is_allowed(scene):
            return scene
    raise UserError(f"styles: {len(names)} things of {style!r} are too few for scenes of {split}")


def render_scene(scene: Scene, image_size: int = 64, *, npm_dir: Path | None = None) -> Image.Image:
    """Render a scene as a square RGB image of at least 32 pixels a side."""
    if image_size < MIN_IMAGE_SIZE:
        raise UserError(f"image_size: got {image_size}, expected at least {MIN_IMAGE_SIZE}")
    pixels = scene.background.render(image_size)
    for item in scene.objects:
        sprite = render_thing(
            item.thing,
            item.color,
            round(item.side * image_size),
            style=scene.style,
            npm_dir=npm_dir,
        )
        paste(pixels, sprite, item.center)
    return Image.fromarray(np.rint(pixels * 255).astype(np.uint8))


def paste(
    pixels: NDArray[np.float32], sprite: NDArray[np.float32], center: tuple[float, float]
) -> None:
    """Lay a sprite, premultiplied RGBA, over pixels of a square image; what sticks out is cut."""
    size, (height, width) = len(pixels), sprite.shape[:2]
    left, top = round(center[0] * size - width / 2), round(center[1] * size - height / 2)
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + width, size), min(top + height, size)
    part = sprite[y0 - top : y1 - top, x0 - left : x1 - left]
    window = pixels[y0:y1, x0:x1]
    window[:] = window * (1 - part[..., 3:]) + part[..., :3]


def _propose(
    rng: random.Random, kind: str, split: str, seed: int, style: str, names: Sequence[str]
) -> Scene:
    """Make a scene, not yet tested for what is held out."""
    background = _choose_background(rng)
    colors = [color for color in COLORS if color not in background.forbidden_colors]
    counted = [name for name in names if all_things()[name].is_counted or kind != "count"]
    relations: tuple[tuple[int, str, int], ...] = ()
    if kind in ("large", "single"):
        thing = rng.choice(counted)
        if split == "test_words":
            thing = rng.choice([name for name in names if all_things()[name].unseen_synonym])
        color = held_out_color(thing) if split == "test_colors" else rng.choice(colors)
        side = rng.choice(SINGLE_SIDES[-1:] if kind == "large" else SINGLE_SIDES)
        objects = [_place(thing, color, side, _any_step(rng, side), _any_step(rng, side))]
    elif kind == "count":
        thing, color, last = rng.choice(counted), rng.choice(colors), _last_step(EQUAL_SIDE)
        corners = rng.sample([(x, y) for x in (0, last) for y in (0, last)], rng.randint(2, 4))
        objects = [_place(thing, color, EQUAL_SIDE, x, y) for x, y in corners]
    else:
        objects, relations = _make_pair(rng, counted, colors)
    kind = "single" if kind == "large" else kind
    return Scene(kind, split, seed, tuple(objects), background, style, relations)


def _choose_background(rng: random.Random) -> Background:
    kind = rng.choices(("plain", "gradient", "ground"), (6, 1, 3))[0]
    return rng.choice([item for item in all_backgrounds() if item.kind == kind])


def _make_pair(
    rng: random.Random, names: Sequence[str], colors: Sequence[str]
) -> tuple[list[SceneObject], tuple[tuple[int, str, int], ...]]:
    """Make two different things, one beside or above the other; a third are of unlike size."""
    things, direction = rng.sample(names, 2), rng.choice(list(DIRECTIONS))
    sides, relations = (EQUAL_SIDE, EQUAL_SIDE), [(0, direction, 1)]
    if rng.random() < 1 / 3:
        first = rng.randrange(2)
        sides = UNLIKE_SIDES if first == 0 else UNLIKE_SIDES[::-1]
        relations.append((0, SIZES[first], 1))
    objects = []
    for sign, thing, side in zip((1, -1), things, sides, strict=True):
        # Along the direction each is at its end; across it, anywhere.
        across = _any_step(rng, side)
        dx, dy = (sign * d for d in DIRECTIONS[direction])
        x = across if dx == 0 else _last_step(side) * (dx > 0)
        y = across if dy == 0 else _last_step(side) * (dy > 0)
        objects.append(_place(thing, rng.choice(colors), side, x, y))
    return objects, tuple(relations)


def _last_step(side: float) -> int:
    return round((1 - 2 * MARGIN - side) / STEP)


def _any_step(rng: random.Random, side: float) -> int:
    return rng.randint(0, _last_step(side))


def _place(thing: str, color: str, side: float, x: int, y: int) -> SceneObject:
    """Put the box of a thing at a step of the grid, counted from the top left."""
    center = (MARGIN + x * STEP + side / 2, MARGIN + y * STEP + side / 2)
    return SceneObject(thing, color, center, side)


def _is_allowed(scene: Scene) -> bool:
    """Tell whether a scene has what its split holds out, and nothing that another one does."""
    things = [item.thing for item in scene.objects]
    held_out = set()
    if any(item.color in scene.background.forbidden_colors for item in scene.objects):
        return False
    if any(item.color == held_out_color(item.thing) for item in scene.objects):
        held_out.add("colors")
    if scene.kind == "count" and len(things) == held_out_count(things[0]):
        held_out.add("counting")
    if scene.kind == "pair":
        if is_held_out_pair(*things):
            held_out |= {"two", "attribution"}
        if any(
            is_held_out_relation(things[a], relation, things[b])
            for a, relation, b in scene.relations
            if relation in DIRECTIONS
        ):
            held_out.add("position")
    task = scene.split.removeprefix("test_")
    if scene.split == "train" or task in ("single", "words"):
        return not held_out
    # Two tasks hold out the same pairs; nothing else may be new in any.
    same = {"two", "attribution"} if task in ("two", "attribution") else {task}
    return held_out == same
