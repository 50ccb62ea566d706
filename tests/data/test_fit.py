"""Images that are not square: what is left of them in a square."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalle_mini_impl.builtin_datasets.shapes.captions import describe_scene
from dalle_mini_impl.builtin_datasets.shapes.checker import read_objects
from dalle_mini_impl.builtin_datasets.shapes.facts import Fact, facts_hold
from dalle_mini_impl.builtin_datasets.shapes.scene import make_scene, render_scene
from dalle_mini_impl.data.images import Fit, resize_to_square
from dalle_mini_impl.data.loading import load_all_pixels
from dalle_mini_impl.data.pairs import ReadOptions, open_pairs

WIDE = (48, 32)


def wide_scenes(count: int) -> Sequence[tuple[Image.Image, list[Fact]]]:
    """Single large shapes anywhere on 48 x 32, and their facts, but for places and sizes."""
    images = []
    for seed in range(count):
        scene = make_scene(seed, split="train", kinds=("single",))
        if scene.objects[0].size != "large":
            continue
        image = Image.new("RGB", WIDE, "white")
        image.paste(render_scene(scene, 32), (seed % 17, 0))
        facts = [
            fact
            for fact in describe_scene(scene).facts
            if fact.kind == "count" and fact.subject.size is None
        ]
        images.append((image, facts))
    return images


def fraction_kept(fit: Fit) -> float:
    """Captions that still hold: the shape is there, in its color and form."""
    kept = []
    for image, facts in wide_scenes(240):
        square = resize_to_square(image, 32 if fit == "crop" else 48, fit)
        kept.append(all(facts_hold(facts, read_objects(square))))
    return float(np.mean(kept))


def test_a_crop_loses_what_pads_keep() -> None:
    assert fraction_kept("pad") == 1.0
    assert fraction_kept("crop") < 0.95


@pytest.mark.parametrize("size", [(48, 32), (32, 48), (48, 1), (7, 5)])
def test_ways_to_become_a_square(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "red")
    rows, columns = size[1], size[0]
    padded = np.asarray(resize_to_square(image, 48, "pad"))
    is_red = (padded == (255, 0, 0)).all(-1)
    height, width = is_red.any(1).sum(), is_red.any(0).sum()
    assert max(height, width) == 48
    assert min(height, width) == max(1, round(48 * min(size) / max(size)))
    assert (rows <= columns) == (height <= width)
    assert (padded[~is_red] == 255).all()
    # As much white on one side as on the other.
    above, below = is_red.any(1).argmax(), is_red.any(1)[::-1].argmax()
    assert abs(above - below) <= 1
    for fit in ("stretch", "crop"):
        whole = np.asarray(resize_to_square(image, 48, fit))
        assert (whole == (255, 0, 0)).all()


def test_readers_pass_the_choice_on(tmp_path: Path) -> None:
    Image.new("RGB", WIDE, "red").save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("red")
    for fit, white in (("crop", 0), ("stretch", 0), ("pad", 48 * 16)):
        pairs = open_pairs(str(tmp_path), options=ReadOptions(fit=fit))
        pixels, _, _ = load_all_pixels(pairs, image_size=48)
        assert (pixels[0] == 255).all(0).sum() == white
