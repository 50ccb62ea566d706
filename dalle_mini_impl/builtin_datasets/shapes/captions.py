"""Captions (English, Korean), facts and files of scenes."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dalle_mini_impl.builtin_datasets.generated_folder import write_generated_folder
from dalle_mini_impl.builtin_datasets.shapes.facts import Fact, ObjectPattern
from dalle_mini_impl.builtin_datasets.shapes.scene import (
    KINDS,
    MIN_IMAGE_SIZE,
    SHAPES,
    SPLITS,
    Scene,
    make_scene,
    render_scene,
)
from dalle_mini_impl.errors import UserError

_NUMBERS = ("no", "one", "two", "three", "four")
_SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
_POSITION_WORDS = {
    "top left": ("at the top left", "in the top left corner", "in the upper left"),
    "top": ("at the top", "near the top", "in the upper middle"),
    "top right": ("at the top right", "in the top right corner", "in the upper right"),
    "left": ("on the left", "at the left", "on the left side"),
    "center": ("in the center", "in the middle", "at the center"),
    "right": ("on the right", "at the right", "on the right side"),
    "bottom left": ("at the bottom left", "in the bottom left corner", "in the lower left"),
    "bottom": ("at the bottom", "near the bottom", "in the lower middle"),
    "bottom right": ("at the bottom right", "in the bottom right corner", "in the lower right"),
}
_RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "lower than"),
}
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_PLURAL = {shape: f"{shape}es" if shape == "cross" else f"{shape}s" for shape in SHAPES}
_KOREAN = {
    "small": "작은",
    "large": "큰",
    "red": "빨간",
    "green": "초록색",
    "blue": "파란",
    "yellow": "노란",
    "purple": "보라색",
    "orange": "주황색",
    "pink": "분홍색",
    "black": "검은",
    "circle": "원",
    "square": "정사각형",
    "triangle": "삼각형",
    "star": "별",
    "ring": "고리",
    "cross": "십자가",
    "top left": "왼쪽 위에",
    "top": "위쪽에",
    "top right": "오른쪽 위에",
    "left": "왼쪽에",
    "center": "가운데에",
    "right": "오른쪽에",
    "bottom left": "왼쪽 아래에",
    "bottom": "아래쪽에",
    "bottom right": "오른쪽 아래에",
    "left of": "왼쪽에",
    "right of": "오른쪽에",
    "above": "위에",
    "below": "아래에",
}
_KOREAN_NUMBERS = ("", "한", "두", "세", "네")


@dataclass(frozen=True)
class Caption:
    """A scene in words."""

    text: str
    """The plain wording."""
    texts: tuple[str, ...]
    """``text`` and four paraphrases that make the same claims, chosen by the scene's seed."""
    text_ko: str
    """``text`` in Korean."""
    facts: tuple[Fact, ...]
    """The claims; an image shows the caption if and only if all of them hold."""


def describe_scene(scene: Scene) -> Caption:
    """Put a scene into words and facts, as a function of the scene alone."""
    # Random numbers of its own: other wordings must not change the scenes.
    rng = random.Random(f"wording {scene.seed}")
    patterns = [
        ObjectPattern(item.size if scene.sizes_stated else None, item.color, item.shape)
        for item in scene.objects
    ]
    # Nothing else may be in the image.
    total = Fact("count", ObjectPattern(), len(scene.objects))
    if scene.kind == "relation":
        wordings = _relation_wordings(scene, patterns, rng)
        korean = _relation_korean(scene, patterns)
        objects = [Fact("count", pattern, 1) for pattern in patterns]
        relations = [Fact("relation", patterns[a], r, patterns[b]) for a, r, b in scene.relations]
        facts = [total, *objects, *relations]
    else:
        first = patterns[0]
        # One fact per attribute, so that an evaluation can tell a wrong color from a wrong shape.
        attributes = [ObjectPattern(color=first.color), ObjectPattern(shape=first.shape)]
        if first.size is not None:
            attributes.append(ObjectPattern(size=first.size))
        facts = [total, *(Fact("count", item, len(scene.objects)) for item in attributes)]
        if scene.kind == "count":
            wordings = _count_wordings(first, len(scene.objects))
            korean = f"{_korean(first)} {_KOREAN_NUMBERS[len(scene.objects)]} 개"
        else:
            wordings = _single_wordings(first, scene.position)
            korean = _korean(first)
        if scene.position is not None:
            facts.append(Fact("position", ObjectPattern(), scene.position))
            korean = f"{_KOREAN[scene.position]} 있는 {korean}"
    # The plain wording first, and four others without repeats.
    texts = (wordings[0], *rng.sample(wordings[1:], 4))
    return Caption(texts[0], texts, korean, tuple(facts))


def prepare_shapes(
    out: Path,
    *,
    counts: Mapping[str, int],
    image_size: int = MIN_IMAGE_SIZE,
    kinds: Sequence[str] = KINDS,
) -> int:
    """Write a data set of shapes; return how many images. See ``write_generated_folder``."""

    def make_image(split: str, seed: int) -> tuple[Image.Image, dict[str, Any]]:
        scene = make_scene(seed, split=split, kinds=kinds)
        caption = describe_scene(scene)
        row = {
            "text": caption.text,
            "texts": caption.texts,
            "text_ko": caption.text_ko,
            "facts": [str(fact) for fact in caption.facts],
        }
        return render_scene(scene, image_size), row

    return write_generated_folder(
        out, make_image, counts=counts, splits=SPLITS, writer="prepare_shapes"
    )


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _korean(pattern: ObjectPattern) -> str:
    return " ".join(_KOREAN[word] for word in str(pattern).split(" "))


def _single_wordings(pattern: ObjectPattern, position: str | None) -> list[str]:
    """List all wordings for one object, the plain one first."""
    # The size is a part of every wording here.
    if pattern.size is None:
        raise UserError("sizes_stated: got False, expected True for a scene of kind 'single'")
    thing = f"{pattern.color} {pattern.shape}"
    words = []
    for size in _SIZE_WORDS[pattern.size]:
        words += [_with_article(f"{size} {thing}"), f"one {size} {thing}", f"{size} {thing}"]
        words += [f"a picture of {_with_article(f'{size} {thing}')}"]
    if position is None:
        return [*words, f"{_with_article(thing)} that is {pattern.size}"]
    return [f"{thing} {place}" for place in _POSITION_WORDS[position] for thing in words]


def _count_wordings(pattern: ObjectPattern, count: int) -> list[str]:
    """List all wordings for some equal objects, the plain one first."""
    shape = str(pattern.shape) if count == 1 else _PLURAL[str(pattern.shape)]
    thing, number = f"{pattern.color} {shape}", _NUMBERS[count]
    return [
        f"{number} {thing}",
        f"{count} {thing}",
        f"exactly {number} {thing}",
        f"a picture of {number} {thing}",
        f"a picture with {count} {thing}",
        f"{number} {shape} in {pattern.color}",
    ]


def _relation_wordings(
    scene: Scene, patterns: list[ObjectPattern], rng: random.Random
) -> list[str]:
    """List all wordings for two objects, or a few for three; the plain one first."""
    names = [_with_article(str(pattern)) for pattern in patterns]
    a, relation, b = scene.relations[0]
    # "a above b" and "b below a" make the same claim.
    pairs = [
        f"{names[x]} {words} {names[y]}"
        for x, y, name in ((a, b, relation), (b, a, _OPPOSITE[relation]))
        for words in _RELATION_WORDS[name]
    ]
    if len(scene.relations) == 1:
        return [*pairs, f"a picture of {pairs[0]}"]
    c, relation, b = scene.relations[1]
    # The reference is known by now: "the", not "a".
    ends = [f"{names[c]} {words} the {patterns[b]}" for words in _RELATION_WORDS[relation]]
    return [f"{pair}, and {end}" for pair in pairs for end in ends]


def _relation_korean(scene: Scene, patterns: list[ObjectPattern]) -> str:
    # All relations share their reference, so it is named once.
    reference = patterns[scene.relations[0][2]]
    parts = [f"{_KOREAN[r]} {_korean(patterns[a])}" for a, r, _ in scene.relations]
    return f"{_korean(reference)}의 {', '.join(parts)}"
