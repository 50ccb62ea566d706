"""The benchmark's figures: right about true images, at chance about shuffled ones."""

import dataclasses
from pathlib import Path

import pytest
import torch

from dalle_mini_impl.builtin_datasets.shapes.captions import describe_scene, prepare_shapes
from dalle_mini_impl.builtin_datasets.shapes.scene import (
    HELD_OUT_PAIRS,
    SIZES,
    Scene,
    make_scene,
    render_scene,
)
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.evaluation.report import CEILING, FLOOR
from dalle_mini_impl.evaluation.samples import join, read_data
from dalle_mini_impl.evaluation.shapes import (
    WHOLE,
    Checked,
    check_images,
    measure_shapes,
)
from tests.reference import tiny


def make_scenes(kind: str, *, split: str = "test", count: int = 40) -> list[Scene]:
    return [make_scene(seed, split=split, kinds=(kind,)) for seed in range(count)]


def check(generated: list[Scene], asked: list[Scene]) -> Checked:
    images = [render_scene(scene) for scene in generated]
    return check_images(images, [describe_scene(scene).facts for scene in asked])


def in_other_size(scene: Scene) -> Scene:
    item = scene.objects[0]
    size = next(name for name in SIZES if name != item.size)
    radius = item.radius * SIZES[size] / SIZES[item.size]
    return dataclasses.replace(
        scene, objects=(dataclasses.replace(item, size=size, radius=radius),)
    )


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
    assert len(checked.is_right) == len(scenes)
    fractions = checked.fractions()
    assert set(fractions) == {WHOLE, *stated}
    assert min(estimate.value for estimate in fractions.values()) >= 0.98
    shuffled = check(scenes, scenes[1:] + scenes[:1]).fractions()
    assert shuffled[WHOLE].value < 0.1  # `test_compose` has but eight pairs


def test_a_wrong_attribute_lowers_its_own_figure_and_the_whole() -> None:
    asked = make_scenes("single")
    checked = check([in_other_size(scene) for scene in asked], asked)
    assert not any(checked.is_right)
    fractions = checked.fractions()
    assert fractions[WHOLE].value == fractions["size"].value == 0.0
    for name in ("number", "color", "shape", "position"):
        assert fractions[name].value >= 0.9
    some_wrong = [in_other_size(scene) if i % 4 == 0 else scene for i, scene in enumerate(asked)]
    checked = check(some_wrong, asked)
    assert sum(checked.is_right) / 40 == pytest.approx(0.75, abs=0.03)
    assert not any(checked.is_right[::4])


def test_the_section_has_both_splits_with_ceiling_and_floor(tmp_path: Path) -> None:
    counts = {"train": 4, "test": 30, "test_compose": 30}
    prepare_shapes(tmp_path / "data", counts=counts, kinds=("single",))
    data = read_data(str(tmp_path / "data"), tiny.build_vqvae(image_size=32))
    assert data.kind == "shapes"
    pairs = [tuple(caption.split()[2:4]) for caption in data.held_out["test_compose"].captions]
    assert set(pairs) <= HELD_OUT_PAIRS
    expected = join([data.held_out["test"], data.held_out["test_compose"]])
    white = torch.full_like(expected.pixels, 255)
    ways = {"one image": expected.pixels, "best of 4": white}
    section = measure_shapes(expected, ways, expected.pixels, seed=0)
    for split in ("test", "test_compose"):
        found = section.figures[split]
        assert list(found) == ["one image", "best of 4", CEILING, FLOOR]
        assert found["one image"][WHOLE].value >= 0.98
        assert found[CEILING] == found["one image"]
        assert found["best of 4"][WHOLE].value == 0.0
        assert found[FLOOR][WHOLE].value < 0.15
        assert f"samples_{split}" in section.images
    assert [row[:2] for row in section.tables[0].rows][:2] == [
        ("one image, test", "30"),
        ("best of 4, test", "30"),
    ]


def test_bad_input_is_refused() -> None:
    scenes = make_scenes("single", count=3)
    with pytest.raises(UserError, match="images: got 2 for 3 captions"):
        check(scenes[:2], scenes)
