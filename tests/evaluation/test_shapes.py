"""Composition on shapes: right about reference images, at chance about shuffled ones."""

import dataclasses
from pathlib import Path

import pytest
import torch

from dalle_mini_impl.builtin_datasets.shapes import scene as shapes
from dalle_mini_impl.builtin_datasets.shapes.captions import describe_scene, prepare_shapes
from dalle_mini_impl.builtin_datasets.shapes.scene import Scene, render_scene
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.evaluation.facts import (
    WHOLE,
    CheckedImages,
    check_images,
    measure_facts,
)
from dalle_mini_impl.evaluation.report import CEILING, FLOOR
from dalle_mini_impl.evaluation.samples import join, read_data
from dalle_mini_impl.evaluation.shapes import SHAPES
from tests.reference import tiny


def make_scenes(kind: str, *, split: str = "test", count: int = 40) -> list[Scene]:
    return [shapes.make_scene(seed, split=split, kinds=(kind,)) for seed in range(count)]


def check(generated: list[Scene], asked: list[Scene]) -> CheckedImages:
    images = [render_scene(scene) for scene in generated]
    facts = [[str(fact) for fact in describe_scene(scene).facts] for scene in asked]
    return check_images(SHAPES, images, [{"facts": lines} for lines in facts])


def in_other_size(scene: Scene) -> Scene:
    item = scene.objects[0]
    size = next(name for name in shapes.SIZES if name != item.size)
    radius = item.radius * shapes.SIZES[size] / shapes.SIZES[item.size]
    other = dataclasses.replace(item, size=size, radius=radius)
    return dataclasses.replace(scene, objects=(other,))


@pytest.mark.parametrize(
    ("kind", "stated"),
    [
        ("single", {"number", "color", "shape", "size", "position"}),
        ("count", {"number", "color", "shape"}),
        ("relation", {"number", "object", "relation"}),
    ],
)
@pytest.mark.parametrize("split", ["test", "test_compose"])
def test_reference_images_pass_and_shuffled_do_not(kind: str, stated: set[str], split: str) -> None:
    scenes = make_scenes(kind, split=split)
    checked = check(scenes, scenes)
    fractions = checked.fractions()
    assert set(fractions) == {WHOLE, *stated}
    assert min(estimate.value for estimate in fractions.values()) >= 0.98
    shuffled = check(scenes, scenes[1:] + scenes[:1]).fractions()
    assert shuffled[WHOLE].value < 0.1  # `test_compose` has only eight pairs


def test_a_wrong_attribute_lowers_its_own_figure() -> None:
    asked = make_scenes("single")
    checked = check([in_other_size(scene) for scene in asked], asked)
    assert not any(checked.is_right)
    fractions = checked.fractions()
    assert fractions[WHOLE].value == fractions["size"].value == 0.0
    for name in ("number", "color", "shape", "position"):
        assert fractions[name].value >= 0.9
    checked = check([in_other_size(asked[0]), *asked[1:]], asked)
    assert not checked.is_right[0]
    assert sum(checked.is_right[1:]) >= 38


def test_section_has_splits_with_ceiling_and_floor(tmp_path: Path) -> None:
    counts = {"train": 4, "test": 30, "test_compose": 30}
    prepare_shapes(tmp_path / "data", counts=counts, kinds=("single",))
    data = read_data(str(tmp_path / "data"), tiny.build_vqvae(image_size=32))
    assert data.kind == "shapes"
    pairs = [tuple(caption.split()[2:4]) for caption in data.held_out["test_compose"].captions]
    assert set(pairs) <= shapes.HELD_OUT_PAIRS
    reference = join([data.held_out["test"], data.held_out["test_compose"]])
    white = torch.full_like(reference.pixels, 255)
    ways = {"one image": reference.pixels, "best of 4": white}
    section = measure_facts(SHAPES, reference, ways, reference.pixels, seed=0)
    for split in ("test", "test_compose"):
        found = section.figures[split]
        assert list(found) == ["one image", "best of 4", CEILING, FLOOR]
        assert found["one image"][WHOLE].value >= 0.98
        assert found[CEILING] == found["one image"]
        assert found["best of 4"][WHOLE].value == 0.0
        assert found[FLOOR][WHOLE].value < 0.15
        assert f"samples_{split}" in section.images
    assert section.tables[0].rows[1][:2] == ("best of 4, test", "30")


def test_missing_images_are_refused() -> None:
    scenes = make_scenes("single", count=3)
    with pytest.raises(UserError, match="images: got 2, expected one for each of 3 captions"):
        check(scenes[:2], scenes)
