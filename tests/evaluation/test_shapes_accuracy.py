"""The benchmark's figures: right about true pictures, at chance about shuffled ones."""

import dataclasses

import pytest
import torch

from dalle_mini_impl.data.shapes import HELD_OUT_PAIRS, SIZES, Scene, draw_scene, make_scene
from dalle_mini_impl.data.shapes_captions import describe_scene
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.evaluation.shapes_accuracy import (
    ShapesReport,
    drawings_sheet,
    evaluate_shapes,
    score_drawings,
)
from dalle_mini_impl.models.dalle import Dalle, DalleConfig
from dalle_mini_impl.pipeline import TextToImagePipeline
from dalle_mini_impl.sampling.generate import ROWS_PER_BATCH
from tests.reference import tiny


def make_scenes(kind: str, *, split: str = "test", count: int = 40) -> list[Scene]:
    return [make_scene(seed, split=split, kinds=(kind,)) for seed in range(count)]


def score(drawn: list[Scene], asked: list[Scene]) -> ShapesReport:
    images = [draw_scene(scene) for scene in drawn]
    return score_drawings(images, [describe_scene(scene) for scene in asked])


def in_other_size(scene: Scene) -> Scene:
    item = scene.objects[0]
    size = next(name for name in SIZES if name != item.size)
    radius = item.radius * SIZES[size] / SIZES[item.size]
    return dataclasses.replace(
        scene, objects=(dataclasses.replace(item, size=size, radius=radius),)
    )


@pytest.fixture(scope="module")
def pipeline() -> TextToImagePipeline:
    """Untrained, with pictures of 32 pixels, as the checker wants them."""
    vqvae, captions = tiny.build_vqvae(image_size=32), tiny.build_captions()
    config = DalleConfig(
        decoder=tiny.DECODER_SIZES,
        vocab_size=captions.vocab_size,
        text_length=captions.text_length,
        codebook_levels=vqvae.codebook_levels,
        image_grid_size=vqvae.image_grid_size,
    )
    dalle = Dalle(config).eval()
    with torch.no_grad():
        dalle.image_head.rows.normal_(generator=torch.Generator().manual_seed(0))
    return TextToImagePipeline(dalle=dalle, vqvae=vqvae, captions=captions)


@pytest.mark.parametrize(
    ("kind", "stated"),
    [
        ("single", {"number", "colour", "shape", "size", "position"}),
        ("count", {"number", "colour", "shape"}),
        ("relation", {"number", "object", "relation"}),
    ],
)
@pytest.mark.parametrize("split", ["test", "test_compose"])
def test_true_pictures_are_right_and_shuffled_ones_are_not(
    kind: str, stated: set[str], split: str
) -> None:
    scenes = make_scenes(kind, split=split)
    report = score(scenes, scenes)
    assert report.accuracy >= 0.98
    assert report.num_captions == len(report.images) == len(report.is_right) == len(scenes)
    assert set(report.fact_accuracies) == stated
    assert min(report.fact_accuracies.values()) >= 0.98
    assert report.shuffled_accuracy < 0.1  # `test_compose` has but eight pairs
    shuffled = score(scenes, scenes[1:] + scenes[:1])
    assert shuffled.accuracy == report.shuffled_accuracy


def test_a_wrong_attribute_lowers_its_own_figure_and_the_whole() -> None:
    asked = make_scenes("single")
    report = score([in_other_size(scene) for scene in asked], asked)
    assert report.accuracy == report.fact_accuracies["size"] == 0.0
    assert not any(report.is_right)
    for name in ("number", "colour", "shape", "position"):
        assert report.fact_accuracies[name] >= 0.9
    some_wrong = [in_other_size(scene) if i % 4 == 0 else scene for i, scene in enumerate(asked)]
    report = score(some_wrong, asked)
    assert report.accuracy == pytest.approx(0.75, abs=0.03)
    assert [index for index, right in enumerate(report.is_right) if index % 4 == 0 and right] == []


def test_captions_are_fresh_and_the_seed_decides_everything(pipeline: TextToImagePipeline) -> None:
    def evaluate(split: str, seed: int) -> ShapesReport:
        return evaluate_shapes(pipeline, split=split, num_captions=20, seed=seed, temperature=2.0)

    first, again, other = (evaluate("test", seed) for seed in (0, 0, 1))
    assert [image.tobytes() for image in first.images] == [i.tobytes() for i in again.images]
    assert dataclasses.replace(first, images=()) == dataclasses.replace(again, images=())
    assert first.captions != other.captions
    # This decoder hardly heeds its captions: pictures differ because batches have their own seeds.
    batches = first.images[:ROWS_PER_BATCH], first.images[ROWS_PER_BATCH:]
    one, two = ({image.tobytes() for image in images} for images in batches)
    assert not one & two
    in_data_sets = tuple(describe_scene(s).text for s in make_scenes("single", count=20))
    assert first.captions != in_data_sets
    pairs = [tuple(caption.split()[2:4]) for caption in evaluate("test_compose", 0).captions]
    assert set(pairs) <= HELD_OUT_PAIRS


def test_the_sheet_shows_drawings_and_marks_the_wrong_ones() -> None:
    scenes = make_scenes("single", count=4)
    right, wrong = score(scenes, scenes), score(scenes[1:] + scenes[:1], scenes)
    assert drawings_sheet(right, 2).size[0] < drawings_sheet(right, 32).size[0]
    assert drawings_sheet(right, 4).tobytes() != drawings_sheet(wrong, 4).tobytes()


def test_bad_input_is_refused(pipeline: TextToImagePipeline) -> None:
    scenes = make_scenes("single", count=3)
    with pytest.raises(UserError, match="images: got 2 for 3 captions"):
        score(scenes[:2], scenes)
    with pytest.raises(UserError, match="num_captions: got 1, want at least 2"):
        evaluate_shapes(pipeline, split="test", num_captions=1, seed=0)
    with pytest.raises(UserError, match="split: got 'val'"):
        evaluate_shapes(pipeline, split="val", num_captions=2, seed=0)
    with pytest.raises(UserError, match="colour: unknown setting"):
        evaluate_shapes(pipeline, split="test", num_captions=2, seed=0, colour="red")
