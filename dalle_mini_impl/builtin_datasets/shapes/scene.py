"""A procedural world of images: colored shapes on white, unlimited and seeded.

A scene is a pure function of (seed, split, kinds) and can be drawn at any size from 32 pixels on.
``captions`` puts it into words and ``facts``, machine-readable claims; ``checker`` verifies such
claims on an image alone.

Composition is measured by ``HELD_OUT_PAIRS``: eight color x shape pairs that never occur in
``train`` or ``test``, though each of their colors and shapes is frequent there; every scene of
``test_compose`` has exactly one object kind from them.

Coordinates are fractions of the image side: (0, 0) is the top left corner, x runs right, y down.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from dalle_mini_impl.errors import UserError

BACKGROUND = (255, 255, 255)
# Far apart not only as colors but also as directions from white, so that the half-covered pixels
# on an object's edge still tell its color (smallest angle 18.7 degrees: yellow and orange).
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 20, 40),
    "green": (20, 180, 50),
    "blue": (20, 80, 240),
    "yellow": (250, 225, 20),
    "purple": (130, 30, 180),
    "orange": (255, 135, 10),
    "pink": (255, 90, 190),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
# Radius of each size, as a fraction of the image side.
SIZES: dict[str, float] = {"small": 0.13, "large": 0.21}
# Where an object with a stated position is drawn, give or take ``_JITTER``.
POSITIONS: dict[str, tuple[float, float]] = {
    "top left": (0.3, 0.3),
    "top": (0.5, 0.3),
    "top right": (0.7, 0.3),
    "left": (0.3, 0.5),
    "center": (0.5, 0.5),
    "right": (0.7, 0.5),
    "bottom left": (0.3, 0.7),
    "bottom": (0.5, 0.7),
    "bottom right": (0.7, 0.7),
}
# Direction (x, y) from the second object to the first.
RELATIONS: dict[str, tuple[int, int]] = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
KINDS = ("single", "count", "relation")
SPLITS = ("train", "test", "test_compose")
# Pairs of color and shape ``train`` and ``test`` lack: each color once, each shape once or twice.
HELD_OUT_PAIRS = frozenset(
    {
        ("red", "star"),
        ("green", "circle"),
        ("blue", "triangle"),
        ("yellow", "cross"),
        ("purple", "square"),
        ("orange", "ring"),
        ("pink", "circle"),
        ("black", "star"),
    }
)
MIN_IMAGE_SIZE = 32

_JITTER = 0.03
_MARGIN = 0.01
_SUPERSAMPLING = 8
# Outlines for radius 1, of about the same visual weight; all have their center of area at (0, 0).
_SQUARE_HALF = 0.88
_POINTED_RADIUS = 1.28
_STAR_INNER_RADIUS = 0.55
_RING_OUTER, _RING_INNER = 1.05, 0.55
_CROSS_LENGTH, _CROSS_WIDTH = 1.05, 0.36


@dataclass(frozen=True)
class ShapeObject:
    """One object of an image, drawn or read back from pixels."""

    shape: str
    """One of ``SHAPES``; "unknown" where a checker could not tell."""
    color: str
    """One of ``COLORS``; "unknown" where a checker could not tell."""
    size: str
    """One of ``SIZES``; "unknown" where a checker could not tell."""
    center: tuple[float, float]
    """(x, y) of the center of area, in fractions of the image side."""
    radius: float
    """Nominal radius in fractions of the image side; corners reach up to 1.28 times as far."""


@dataclass(frozen=True)
class Scene:
    """What an image holds, and what of it the caption mentions."""

    kind: str
    """One of ``KINDS``."""
    objects: tuple[ShapeObject, ...]
    seed: int
    """It also chooses the wording of the paraphrases."""
    position: str | None = None
    """For "single": the position the caption states, one of ``POSITIONS``."""
    sizes_stated: bool = True
    relations: tuple[tuple[int, str, int], ...] = ()
    """For "relation": (object index, one of ``RELATIONS``, object index)."""


def make_scene(seed: int, *, split: str, kinds: Sequence[str] = KINDS) -> Scene:
    """Make the scene of a seed; the same arguments always give the same scene.

    Args:
        seed: Any integer; each split has random numbers of its own, so seeds may be reused across
            splits.
        split: "train", "test" (same distribution) or "test_compose" (held-out pairs only).
        kinds: The kinds to choose from. "single": one object, position stated in half of the
            scenes, else near the center. "count": one to four equal objects. "relation": two or
            three objects and how they stand to each other.
    """
    if split not in SPLITS:
        raise UserError(f"split: got {split!r}, expected one of {SPLITS}")
    if not kinds or not set(kinds) <= set(KINDS):
        raise UserError(f"kinds: got {tuple(kinds)!r}, expected some of {KINDS}")
    # A string seed is stable across Python versions. The order of the calls below is the data set:
    # one number more or less would change every scene.
    rng = random.Random(f"shapes {split} {seed}")
    kind = rng.choice([kind for kind in KINDS if kind in kinds])
    if kind == "single":
        return _make_single(rng, split, seed)
    if kind == "count":
        return _make_count(rng, split, seed)
    return _make_relation(rng, split, seed)


def render_scene(scene: Scene, image_size: int = MIN_IMAGE_SIZE) -> Image.Image:
    """Draw a scene, anti-aliased, on white: a square RGB image of at least 32 pixels a side."""
    if image_size < MIN_IMAGE_SIZE:
        raise UserError(f"image_size: got {image_size}, expected at least {MIN_IMAGE_SIZE}")
    # Pillow draws hard edges: draw large, and let the mean of 8 x 8 pixels smooth them.
    canvas_size = image_size * _SUPERSAMPLING
    canvas = Image.new("RGB", (canvas_size, canvas_size), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for item in scene.objects:
        _render_object(draw, item, canvas_size)
    return canvas.reduce(_SUPERSAMPLING)


def _render_object(draw: ImageDraw.ImageDraw, item: ShapeObject, canvas_size: int) -> None:
    # Pillow counts pixel centers, hence the half pixel.
    x = item.center[0] * canvas_size - 0.5
    y = item.center[1] * canvas_size - 0.5
    radius = item.radius * canvas_size
    color = COLORS[item.color]

    def disc(scale: float, fill: tuple[int, int, int]) -> None:
        reach = scale * radius
        draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=fill)

    if item.shape == "circle":
        disc(1.0, color)
    elif item.shape == "ring":
        disc(_RING_OUTER, color)
        disc(_RING_INNER, BACKGROUND)
    else:
        outline = [(x + dx * radius, y + dy * radius) for dx, dy in _unit_outline(item.shape)]
        draw.polygon(outline, fill=color)


def _unit_outline(shape: str) -> list[tuple[float, float]]:
    """List the corners (x, y) of a shape of radius 1 around the origin."""
    if shape == "square":
        half = _SQUARE_HALF
        return [(-half, -half), (half, -half), (half, half), (-half, half)]
    if shape == "cross":
        long, wide = _CROSS_LENGTH, _CROSS_WIDTH
        arm = [(-wide, -wide), (-wide, -long), (wide, -long)]  # and its three quarter turns
        turns = ((1, 0), (0, 1), (-1, 0), (0, -1))
        return [(c * px - s * py, s * px + c * py) for c, s in turns for px, py in arm]
    if shape == "triangle":
        radii = [_POINTED_RADIUS] * 3
    elif shape == "star":
        radii = [_POINTED_RADIUS, _STAR_INNER_RADIUS] * 5
    else:
        raise UserError(f"shape: got {shape!r}, expected one of {SHAPES}")
    angles = [2 * math.pi * k / len(radii) - math.pi / 2 for k in range(len(radii))]  # first: up
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def _choose_pairs(rng: random.Random, split: str, count: int) -> list[tuple[str, str]]:
    """Choose different (color, shape) pairs; exactly one is held out in "test_compose"."""
    held_out = sorted(HELD_OUT_PAIRS)
    seen = [(c, s) for c in COLORS for s in SHAPES if (c, s) not in HELD_OUT_PAIRS]
    if split != "test_compose":
        return rng.sample(seen, count)
    # Exactly one held-out pair, at a random place among the others.
    pairs = [rng.choice(held_out), *rng.sample(seen, count - 1)]
    rng.shuffle(pairs)
    return pairs


def _place(
    rng: random.Random,
    pair: tuple[str, str],
    size: str,
    target: tuple[float, float],
    jitter: float = _JITTER,
) -> ShapeObject:
    """Put an object near ``target``, wholly inside the image."""
    radius = SIZES[size] * rng.uniform(0.96, 1.04)
    reach = radius * _POINTED_RADIUS + _MARGIN
    x, y = (min(max(v + rng.uniform(-jitter, jitter), reach), 1 - reach) for v in target)
    return ShapeObject(pair[1], pair[0], size, (x, y), radius)


def _make_single(rng: random.Random, split: str, seed: int) -> Scene:
    """Make one object; its position is stated in half of the scenes."""
    pair = _choose_pairs(rng, split, 1)[0]
    size = rng.choice(list(SIZES))
    position = rng.choice(list(POSITIONS)) if rng.random() < 0.5 else None
    item = _place(rng, pair, size, POSITIONS[position or "center"])
    return Scene("single", (item,), seed, position=position)


def _make_count(rng: random.Random, split: str, seed: int) -> Scene:
    """Make one to four small objects of the same color and shape, in the cells of a 2 x 2 grid."""
    pair = _choose_pairs(rng, split, 1)[0]
    # Small objects in different cells of the grid cannot touch.
    cells = rng.sample([(x, y) for x in (0.27, 0.73) for y in (0.27, 0.73)], rng.randint(1, 4))
    objects = tuple(_place(rng, pair, "small", cell) for cell in cells)
    return Scene("count", objects, seed, sizes_stated=False)


def _make_relation(rng: random.Random, split: str, seed: int) -> Scene:
    """Make two objects side by side or one above the other, or three in an L."""
    if rng.random() < 0.5:
        return _make_three(rng, split, seed)
    pairs = _choose_pairs(rng, split, 2)
    sizes = rng.choice([("small", "small"), ("large", "small"), ("small", "large")])
    relation = rng.choice(list(RELATIONS))
    dx, dy = RELATIONS[relation]
    # Small objects move outwards to leave the large one its room; the gap stays at least 0.06.
    near, far, jitter = (0.21, 0.32, 0.015) if "large" in sizes else (0.23, 0.23, _JITTER)
    reach = [near if size == "large" else far for size in sizes]
    # Along the direction of the relation they are well apart; across it they may be off a little.
    aside = rng.uniform(-0.08, 0.08)
    centers = []
    for direction, distance in zip((1, -1), reach, strict=True):
        along = direction * distance
        centers.append((0.5 + along * dx + aside * abs(dy), 0.5 + along * dy + aside * abs(dx)))
    objects = tuple(
        _place(rng, pair, size, center, jitter)
        for pair, size, center in zip(pairs, sizes, centers, strict=True)
    )
    stated = rng.random() < 0.5
    return Scene("relation", objects, seed, sizes_stated=stated, relations=((0, relation, 1),))


def _make_three(rng: random.Random, split: str, seed: int) -> Scene:
    """Make three small objects in an L: one beside the second, one above or below it."""
    pairs = _choose_pairs(rng, split, 3)
    x, y = rng.choice((0.27, 0.73)), rng.choice((0.27, 0.73))
    centers = ((1 - x, y), (x, y), (x, 1 - y))
    objects = tuple(
        _place(rng, pair, "small", center) for pair, center in zip(pairs, centers, strict=True)
    )
    # The second object is the corner of the L; both relations refer to it.
    beside = "right of" if x < 0.5 else "left of"
    stacked = "below" if y < 0.5 else "above"
    relations = ((0, beside, 1), (2, stacked, 1))
    return Scene("relation", objects, seed, sizes_stated=False, relations=relations)
