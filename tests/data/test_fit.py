"""Images of other proportions than the model's: what is left of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalle_mini_impl.builtin_datasets.shapes.captions import describe_scene
from dalle_mini_impl.builtin_datasets.shapes.checker import read_objects
from dalle_mini_impl.builtin_datasets.shapes.facts import Fact, facts_hold
from dalle_mini_impl.builtin_datasets.shapes.scene import make_scene, render_scene
from dalle_mini_impl.data.images import (
    Fit,
    decode_image,
    middle_window,
    resize_to_fit,
    window_fraction,
)
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
        square = resize_to_fit(image, (32, 32) if fit == "crop" else (48, 48), fit)
        kept.append(all(facts_hold(facts, read_objects(square))))
    return float(np.mean(kept))


def test_a_crop_loses_what_pads_keep() -> None:
    assert fraction_kept("pad") == 1.0
    assert fraction_kept("crop") < 0.95


@pytest.mark.parametrize("size", [(48, 32), (32, 48), (48, 1), (7, 5)])
def test_ways_to_become_a_square(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "red")
    rows, columns = size[1], size[0]
    padded = np.asarray(resize_to_fit(image, (48, 48), "pad"))
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
        whole = np.asarray(resize_to_fit(image, (48, 48), fit))
        assert (whole == (255, 0, 0)).all()


@pytest.mark.parametrize("size", [(48, 32), (32, 48), (48, 1), (7, 5), (1, 90)])
@pytest.mark.parametrize("target", [(32, 48), (48, 16)])
def test_ways_to_become_a_rectangle(size: tuple[int, int], target: tuple[int, int]) -> None:
    red, (height, width) = Image.new("RGB", size, "red"), target
    padded = np.asarray(resize_to_fit(red, target, "pad"))
    assert padded.shape == (height, width, 3)
    is_red = (padded == (255, 0, 0)).all(-1)
    inner = is_red.any(1).sum(), is_red.any(0).sum()
    scale = min(height / size[1], width / size[0])
    assert inner == (max(1, round(size[1] * scale)), max(1, round(size[0] * scale)))
    assert (padded[~is_red] == 255).all()
    for profile in (is_red.any(1), is_red.any(0)):
        assert abs(profile.argmax() - profile[::-1].argmax()) <= 1
    for fit in ("stretch", "crop"):
        whole = np.asarray(resize_to_fit(red, target, fit))
        assert (whole == (255, 0, 0)).all()
        assert whole.shape == (height, width, 3)


def test_the_window_is_the_largest_in_the_middle() -> None:
    """Against a search over all windows with the same proportions."""
    for size in ((48, 32), (30, 60), (90, 20), (36, 24), (5, 5)):
        for height, width in ((2, 3), (3, 1), (1, 1)):
            left, top, right, bottom = middle_window(size, (height * 8, width * 8))
            # In sixths of a pixel: all sizes here have a whole number of them.
            scale = max(
                n for n in range(999) if n * width <= 6 * size[0] and n * height <= 6 * size[1]
            )
            assert right - left == pytest.approx(scale * width / 6)
            assert bottom - top == pytest.approx(scale * height / 6)
            assert (right - left) * height == pytest.approx((bottom - top) * width)
            assert (left + right, top + bottom) == pytest.approx(size)
            assert 0 <= left < right <= size[0]
            assert 0 <= top < bottom <= size[1]
            fraction = (right - left) * (bottom - top) / (size[0] * size[1])
            assert window_fraction(size, (height * 8, width * 8)) == pytest.approx(fraction)
    assert window_fraction((48, 32), (32, 48)) == 1.0


def test_big_turned_jpegs_become_rectangles(tmp_path: Path) -> None:
    """The file holds 1600 x 400 pixels, a note in it says that they are to be turned."""
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the image is at the right of the file
    waves = np.sin(np.arange(400) * 2 * np.pi / 25)  # across the file, along the image
    rows = np.broadcast_to((128 + 120 * waves).astype(np.uint8)[:, None], (400, 1600))
    Image.fromarray(rows).convert("RGB").save(tmp_path / "a.jpg", exif=exif, quality=95)
    (tmp_path / "a.txt").write_text("waves")
    pairs = open_pairs(str(tmp_path))
    for pixel_size in ((96, 24), (24, 96)):
        [pixels], _, _ = load_all_pixels(pairs, pixel_size=pixel_size)
        whole = decode_image(pairs.read_image(0), source="a")
        assert whole.size == (400, 1600)
        expected = np.array(resize_to_fit(whole, pixel_size, "crop")).transpose(2, 0, 1)
        assert pixels.shape == (3, *pixel_size)
        assert np.abs(pixels.numpy().astype(int) - expected).max() <= 4


def test_readers_pass_the_choice_on(tmp_path: Path) -> None:
    Image.new("RGB", WIDE, "red").save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("red")
    for fit, white in (("crop", 0), ("stretch", 0), ("pad", 48 * 16)):
        pairs = open_pairs(str(tmp_path), options=ReadOptions(fit=fit))
        pixels, _, _ = load_all_pixels(pairs, pixel_size=(48, 48))
        assert (pixels[0] == 255).all(0).sum() == white
