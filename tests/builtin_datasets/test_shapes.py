"""The shapes world: its splits, its words, and the checker that reads images back."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from dalle_mini_impl.builtin_datasets.shapes.captions import describe_scene, prepare_shapes
from dalle_mini_impl.builtin_datasets.shapes.checker import read_objects
from dalle_mini_impl.builtin_datasets.shapes.facts import (
    Fact,
    ObjectPattern,
    facts_hold,
    parse_fact,
)
from dalle_mini_impl.builtin_datasets.shapes.scene import (
    COLORS,
    HELD_OUT_PAIRS,
    KINDS,
    POSITIONS,
    SHAPES,
    SIZES,
    SPLITS,
    Scene,
    ShapeObject,
    make_scene,
    render_scene,
)
from dalle_mini_impl.errors import UserError
from tests.reference.commands import run_apart

ANYTHING = ObjectPattern()


def make_scenes(count: int, kinds: tuple[str, ...] = KINDS) -> list[Scene]:
    """Scenes of all splits in turn."""
    return [make_scene(seed, split=SPLITS[seed % 3], kinds=kinds) for seed in range(count)]


def make_object(**changes: Any) -> ShapeObject:
    """A small red circle in the middle, but for the changes."""
    item = ShapeObject("circle", "red", "small", (0.5, 0.5), SIZES["small"])
    return replace(item, **changes)


def add_noise(image: Image.Image, sigma: float, seed: int) -> np.ndarray:
    """Gaussian noise of ``sigma`` levels out of 255."""
    pixels = np.asarray(image, dtype=np.float64)
    noise = np.random.default_rng(seed).normal(0, sigma, pixels.shape)
    return np.clip(pixels + noise, 0, 255).round().astype(np.uint8)


def held_facts(image: Any, facts: Sequence[Fact]) -> tuple[bool, ...]:
    return facts_hold(facts, read_objects(image))


def satisfies(scene: Scene, facts: Sequence[Fact]) -> bool:
    return all(facts_hold(facts, scene.objects))


def measure(count: int, image_size: int) -> tuple[float, float, float]:
    """Fractions: captions held; verdicts on other captions, and on their facts, that are right."""
    scenes = make_scenes(count)
    captions = [describe_scene(scene) for scene in scenes]
    shuffled = random.Random(1).sample(captions, count)
    held, verdicts, facts = [], [], []
    for scene, caption, other in zip(scenes, captions, shuffled, strict=True):
        image = render_scene(scene, image_size)
        held.append(all(held_facts(image, caption.facts)))
        seen = held_facts(image, other.facts)
        verdicts.append(all(seen) == satisfies(scene, other.facts))
        truth = facts_hold(other.facts, scene.objects)
        facts += [a == b for a, b in zip(seen, truth, strict=True)]
    return float(np.mean(held)), float(np.mean(verdicts)), float(np.mean(facts))


# The world


def test_scenes_and_captions_are_functions_of_the_seed() -> None:
    for seed in range(50):
        scene = make_scene(seed, split="train")
        assert make_scene(seed, split="train") == scene
        assert describe_scene(scene) == describe_scene(make_scene(seed, split="train"))
        assert np.array_equal(np.asarray(render_scene(scene)), np.asarray(render_scene(scene)))


def test_the_world_of_a_seed_is_pinned() -> None:
    """Python's random promises the same numbers in every version; a data set relies on it."""
    texts = [describe_scene(make_scene(seed, split="train")).text for seed in range(3)]
    pinned = ["a large purple star at the bottom right", "a large purple cross", "two yellow stars"]
    assert texts == pinned


def test_splits_use_independent_streams() -> None:
    train = [make_scene(seed, split="train", kinds=("single",)).objects for seed in range(100)]
    test = [make_scene(seed, split="test", kinds=("single",)).objects for seed in range(100)]
    assert not set(train) & set(test)


def test_held_out_pairs_are_few_and_spread() -> None:
    assert len(HELD_OUT_PAIRS) == 8
    assert sorted(color for color, _ in HELD_OUT_PAIRS) == sorted(COLORS)
    for shape in SHAPES:
        assert 1 <= sum(shape == held for _, held in HELD_OUT_PAIRS) <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_pairs_are_in_test_compose_only(kind: str) -> None:
    for seed in range(300):
        for split in SPLITS:
            scene = make_scene(seed, split=split, kinds=(kind,))
            pairs = {(item.color, item.shape) for item in scene.objects}
            assert len(pairs & HELD_OUT_PAIRS) == (split == "test_compose"), (seed, split)


def test_every_pair_is_frequent_in_its_split() -> None:
    counts = {(color, shape): 0 for color in COLORS for shape in SHAPES}
    for seed in range(2000):
        item = make_scene(seed, split="train", kinds=("single",)).objects[0]
        counts[item.color, item.shape] += 1
    for pair, count in counts.items():
        assert count == 0 if pair in HELD_OUT_PAIRS else count > 20, pair


def test_scenes_are_inside_the_image_and_apart() -> None:
    """Ink on the border or inks in contact would make a image ambiguous."""
    for scene in make_scenes(300):
        ink = np.asarray(render_scene(scene, 64)).min(-1) < 128
        assert ink.sum() == ink[1:-1, 1:-1].sum()
        parts = [np.asarray(render_scene(replace(scene, objects=(o,)), 64)) for o in scene.objects]
        grown = [part.min(-1) < 250 for part in parts]
        for axis in (0, 1):
            grown = [g | np.roll(g, 1, axis) | np.roll(g, -1, axis) for g in grown]
        assert np.sum(grown, axis=0).max() == 1


def test_single_objects_without_a_position_are_near_the_center() -> None:
    stated = set()
    for seed in range(400):
        scene = make_scene(seed, split="train", kinds=("single",))
        target = POSITIONS[scene.position or "center"]
        gaps = [abs(a - b) for a, b in zip(scene.objects[0].center, target, strict=True)]
        assert max(gaps) <= 0.03 + 1e-9
        stated.add(scene.position)
    assert stated == {None, *POSITIONS}


def test_unknown_kinds_and_split_and_tiny_size_are_refused() -> None:
    for kinds in ((), ("double",), ("single", "double")):
        with pytest.raises(UserError, match="kinds: got"):
            make_scene(0, split="train", kinds=kinds)
    with pytest.raises(UserError, match="split: got 'val'"):
        make_scene(0, split="val")
    with pytest.raises(UserError, match="image_size: got 31"):
        render_scene(make_scene(0, split="train"), 31)


# The words


LARGE_ORANGE = make_object(color="orange", size="large")
CROSS = make_object(shape="cross")
THREE = (make_object(), make_object(color="orange"), make_object(shape="star"))
RELATIONS = ((0, "left of", 1), (2, "below", 1))


@pytest.mark.parametrize(
    ("scene", "text", "text_ko", "facts"),
    [
        (
            Scene("single", (LARGE_ORANGE,), 3, position="top left"),
            "a large orange circle at the top left",
            "왼쪽 위에 있는 큰 주황색 원",
            "count | any | 1; count | orange | 1; count | circle | 1; count | large | 1; "
            "position | any | top left",
        ),
        (
            Scene("count", (CROSS, CROSS), 0, sizes_stated=False),
            "two red crosses",
            "빨간 십자가 두 개",
            "count | any | 2; count | red | 2; count | cross | 2",
        ),
        (
            Scene("relation", THREE, 0, sizes_stated=False, relations=RELATIONS),
            "a red circle left of an orange circle, and a red star below the orange circle",
            "주황색 원의 왼쪽에 빨간 원, 아래에 빨간 별",
            "count | any | 3; count | red circle | 1; count | orange circle | 1; "
            "count | red star | 1; relation | red circle | left of | orange circle; "
            "relation | red star | below | orange circle",
        ),
    ],
)
def test_words_of_a_scene(scene: Scene, text: str, text_ko: str, facts: str) -> None:
    caption = describe_scene(scene)
    assert (caption.text, caption.text_ko) == (text, text_ko)
    assert "; ".join(map(str, caption.facts)) == facts


def test_paraphrases_differ_and_name_what_the_caption_names() -> None:
    for scene in make_scenes(300):
        caption = describe_scene(scene)
        assert len(set(caption.texts)) == 5
        assert caption.texts[0] == caption.text
        for text in caption.texts:
            for item in scene.objects:
                assert item.color in text
                assert item.shape in text
        assert satisfies(scene, caption.facts)


def test_facts_survive_as_lines() -> None:
    for scene in make_scenes(300):
        for fact in describe_scene(scene).facts:
            assert parse_fact(str(fact)) == fact


@pytest.mark.parametrize(
    "line",
    [
        "",
        "count",
        "count | red | two",
        "count | red rose | 2",
        "count | circle red | 1",
        "count | red | 2 | blue",
        "position | any | middle",
        "relation | red | left of",
        "relation | red | near | blue",
        "color | any | red",
    ],
)
def test_lines_that_are_no_facts_are_refused(line: str) -> None:
    with pytest.raises(UserError, match="got"):
        parse_fact(line)


def test_what_facts_mean() -> None:
    left, right = make_object(center=(0.3, 0.5)), make_object(center=(0.7, 0.52), color="blue")
    red, blue = ObjectPattern(color="red"), ObjectPattern(color="blue")

    def holds(fact: Fact) -> bool:
        return facts_hold([fact], [left, right])[0]

    assert holds(Fact("count", ANYTHING, 2))
    assert not holds(Fact("count", ANYTHING, 1))
    assert holds(Fact("count", ObjectPattern("small", "red", "circle"), 1))
    assert holds(Fact("count", ObjectPattern(shape="star"), 0))
    assert holds(Fact("relation", red, "left of", blue))
    assert holds(Fact("relation", blue, "right of", red))
    assert not holds(Fact("relation", blue, "left of", red))
    assert not holds(Fact("relation", red, "above", blue))  # by 0.02 only: not clear
    assert holds(Fact("position", red, "left"))
    assert not holds(Fact("position", red, "top left"))
    assert not holds(Fact("position", blue, "left"))
    with pytest.raises(UserError, match="fact: got"):
        holds(Fact("relation", red, "left of"))


# The checker


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("image_size", [32, 45, 64])
def test_checker_agrees_with_the_scenes(image_size: int, count: int) -> None:
    assert min(measure(count, image_size)) >= 0.995


@pytest.mark.parametrize("image_size", [32, 64])
def test_checker_tolerates_noise_and_blur(image_size: int) -> None:
    held: dict[str, list[bool]] = {}
    for scene in make_scenes(150):
        facts = describe_scene(scene).facts
        image = render_scene(scene, image_size)
        blurred = image.filter(ImageFilter.GaussianBlur(0.8 * image_size / 32))
        images: dict[str, Any] = {
            "noise": add_noise(image, 8, scene.seed),
            "strong noise": add_noise(image, 22, scene.seed),
            "blur": blurred,
            "noise and blur": add_noise(blurred, 8, scene.seed),
            "pale": Image.blend(image, Image.new("RGB", image.size, "white"), 0.2),
        }
        for name, altered in images.items():
            held.setdefault(name, []).append(all(held_facts(altered, facts)))
    fractions = {name: float(np.mean(values)) for name, values in held.items()}
    assert min(fractions.values()) >= 0.98, fractions


def test_one_changed_attribute_breaks_exactly_its_facts() -> None:
    """Hard negatives: the image is right but for one thing."""
    for seed in range(150):
        scene = make_scene(seed, split="train", kinds=("single",))
        caption, item, rng = describe_scene(scene), scene.objects[0], random.Random(seed)
        size = "small" if item.size == "large" else "large"
        changes: dict[str, dict[str, Any]] = {
            item.color: {"color": rng.choice([c for c in COLORS if c != item.color])},
            item.shape: {"shape": rng.choice([s for s in SHAPES if s != item.shape])},
            item.size: {"size": size, "radius": SIZES[size]},
        }
        if scene.position is not None:
            other = rng.choice([p for p in POSITIONS if p != scene.position])
            changes["any"] = {"center": POSITIONS[other]}
        for word, change in changes.items():
            image = render_scene(replace(scene, objects=(replace(item, **change),)))
            held = held_facts(image, caption.facts)
            broken = [f for f, ok in zip(caption.facts, held, strict=True) if not ok]
            assert [str(fact.subject) for fact in broken] == [word], (seed, change)
            assert word != "any" or broken[0].kind == "position"


@pytest.mark.parametrize("color", COLORS)
def test_one_more_object_breaks_the_count(color: str) -> None:
    scene = Scene("single", (make_object(center=(0.25, 0.25)),), 0)
    more = replace(scene, objects=(*scene.objects, make_object(center=(0.7, 0.7), color=color)))
    facts = describe_scene(scene).facts
    assert all(held_facts(render_scene(scene), facts))
    assert not held_facts(render_scene(more), facts)[0]


def test_objects_of_different_colors_that_touch_are_two() -> None:
    red = make_object(shape="square", center=(0.35, 0.5))
    objects = (red, replace(red, center=(0.58, 0.5), color="blue"))
    seen = read_objects(render_scene(Scene("count", objects, 0)))
    assert [(o.color, o.shape) for o in seen] == [("red", "square"), ("blue", "square")]


def test_centers_and_radii_are_read_to_a_third_of_a_pixel() -> None:
    for scene in make_scenes(150, ("single",)):
        item, seen = scene.objects[0], read_objects(render_scene(scene))[0]
        assert seen.center == pytest.approx(item.center, abs=1 / 96)
        assert seen.radius == pytest.approx(item.radius, abs=1 / 96)


def square(side: float) -> list[tuple[float, float]]:
    low, high = 16 - side / 2, 16 + side / 2
    return [(low, low), (high, low), (high, high), (low, high)]


@pytest.mark.parametrize(
    ("corners", "color", "expected"),
    [
        ([(4, 13), (28, 13), (28, 19), (4, 19)], COLORS["red"], "unknown red"),  # a bar
        ([(9, 9), (23, 9), (16, 23)], COLORS["red"], "unknown red"),  # a triangle on its tip
        ([(8, 8), (13, 8), (13, 19), (24, 19), (24, 24), (8, 24)], COLORS["red"], "unknown red"),
        *((square(side), COLORS["black"], "unknown unknown black") for side in (5, 24, 32)),
        (square(12), (150, 150, 150), "square unknown"),
        (square(12), (120, 70, 20), "square unknown"),
        (square(12), (150, 200, 255), "square unknown"),
    ],
)
def test_other_shapes_sizes_and_colors_are_unknown_but_count(
    corners: list[tuple[float, float]], color: tuple[int, int, int], expected: str
) -> None:
    image = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(image).polygon([(8 * x, 8 * y) for x, y in corners], fill=color)
    (seen,) = read_objects(image.reduce(8))
    assert expected in (f"{seen.shape} {seen.color}", f"{seen.shape} {seen.size} {seen.color}")


def test_nothing_and_garbage_show_no_caption() -> None:
    blank = np.full((32, 32, 3), 255, dtype=np.uint8)
    garbage = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    assert read_objects(blank) == ()
    facts = [describe_scene(scene).facts for scene in make_scenes(80)]
    for image in (blank, *garbage, np.zeros_like(blank)):
        seen = read_objects(image)
        assert not any(all(facts_hold(claims, seen)) for claims in facts)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "image",
    [
        np.zeros((32, 32, 3), dtype=np.float32),
        np.zeros((3, 32, 32), dtype=np.uint8),
        np.zeros((32, 64, 3), dtype=np.uint8),
        np.zeros((16, 16, 3), dtype=np.uint8),
        Image.new("RGB", (40, 32)),
    ],
)
def test_other_images_are_refused(image: object) -> None:
    with pytest.raises(UserError, match="image: got"):
        read_objects(image)  # type: ignore[arg-type]


def test_chance_of_single_captions_is_below_five_percent() -> None:
    scenes = [make_scene(seed, split="train", kinds=("single",)) for seed in range(250)]
    facts = [describe_scene(scene).facts for scene in scenes]
    hits = [satisfies(a, facts[j]) for i, a in enumerate(scenes) for j in range(i)]
    assert 0.001 < np.mean(hits) < 0.05


# The files


def test_prepared_folder_holds_images_of_their_facts(tmp_path: Path) -> None:
    counts = {"train": 5, "test": 3, "test_compose": 2}
    prepare_shapes(tmp_path, counts=counts)
    stale = tmp_path / "images" / "train" / "0000099.png"
    stale.touch()
    (tmp_path / "metadata.jsonl").unlink()  # as an interrupted run leaves it
    assert prepare_shapes(tmp_path, counts=counts, image_size=40) == 10
    lines = (tmp_path / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["split"] for row in rows] == ["train"] * 5 + ["test"] * 3 + ["test_compose"] * 2
    for row in rows:
        assert set(row) == {"file_name", "text", "texts", "text_ko", "split", "facts"}
        with Image.open(tmp_path / row["file_name"]) as image:
            assert image.size == (40, 40)
            facts = [parse_fact(line) for line in row["facts"]]
            assert all(held_facts(image, facts))
    assert len(list(tmp_path.rglob("*.png"))) == 10


def test_bad_counts_are_refused(tmp_path: Path) -> None:
    for counts in ({"train": -1}, {"val": 1}):
        with pytest.raises(UserError, match="counts: got"):
            prepare_shapes(tmp_path, counts=counts)


def test_script_writes_a_folder(tmp_path: Path) -> None:
    counts = ("--train", "3", "--test", "2", "--test-compose", "1")
    done = run_apart("prepare_shapes", "--out", tmp_path / "set", *counts, "--kinds", "single")
    assert (done.returncode, done.stderr) == (0, "")
    assert "6 images of 32 x 32" in done.stdout
