"""Image decoding, square crops, pixel tensors and grids.

Damaged and hostile files are in ``tests/faults/test_data_images.py``.
"""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from dalle_mini_impl.data import image_grid
from dalle_mini_impl.data.image_grid import make_grid
from dalle_mini_impl.data.images import (
    BadImageError,
    decode_image,
    image_to_pixels,
    pixels_to_images,
    resize_and_crop,
    to_rgb,
)
from dalle_mini_impl.errors import UserError
from tests.faults.hostile import encoded, png_of

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP"])
def test_lossless_formats_come_back_exactly(format: str) -> None:
    image = noise(7, 5)
    options = {"lossless": True} if format == "WEBP" else {}
    decoded = decode_image(encoded(image, format, **options), source="x")
    assert decoded.mode == "RGB"
    assert decoded.tobytes() == image.tobytes()


def test_transparency_is_laid_over_white() -> None:
    image = Image.new("RGBA", (3, 1))
    for x, color in enumerate([(255, 0, 0, 255), (0, 0, 0, 0), (0, 0, 0, 128)]):
        image.putpixel((x, 0), color)
    for format in ("PNG", "WEBP"):
        options = {"lossless": True, "exact": True} if format == "WEBP" else {}
        decoded = decode_image(encoded(image, format, **options), source="x")
        assert decoded.getpixel((0, 0)) == RED
        assert decoded.getpixel((1, 0)) == WHITE
        assert decoded.getpixel((2, 0)) == (127, 127, 127)


def test_color_key_transparency_of_rgb_and_gray_images() -> None:
    image = Image.new("RGB", (2, 1), GREEN)
    image.putpixel((0, 0), RED)
    decoded = decode_image(encoded(image, "PNG", transparency=RED), source="x")
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [WHITE, GREEN]
    gray = Image.new("L", (2, 1), 7)
    gray.putpixel((0, 0), 9)
    decoded = decode_image(encoded(gray, "PNG", transparency=9), source="x")
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [WHITE, (7, 7, 7)]


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        ([0, 257, 300, 32768, 65535], {}, [0, 1, 1, 128, 255]),
        ([500, 40_000], {"transparency": 500}, [255, 156]),
    ],
)
def test_sixteen_bit_gray_is_scaled(
    values: list[int], options: dict[str, int], expected: list[int]
) -> None:
    image = Image.fromarray(np.array([values], dtype=np.uint16))
    decoded = decode_image(encoded(image, "PNG", **options), source="x")
    assert np.asarray(decoded)[0, :, 0].tolist() == expected


def test_the_size_limit_is_checked_before_decoding() -> None:
    assert issubclass(BadImageError, UserError)
    data = png_of((10_000, 5_001))  # decoding this one fails, so the message proves the order
    with pytest.raises(BadImageError, match="10000x5001 pixels, expected at most 50000000 pixels"):
        decode_image(data, source="x")
    with pytest.raises(BadImageError, match="damaged"):
        decode_image(png_of((10_000, 5_000)), source="x")


def test_bad_image_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(BadImageError("a.jpg", "damaged")))
    assert (error.source, error.reason, str(error)) == ("a.jpg", "damaged", "a.jpg: damaged")


def test_big_jpegs_may_be_decoded_smaller() -> None:
    data = encoded(Image.linear_gradient("L").resize((800, 400)).convert("RGB"), "JPEG")
    assert decode_image(data, source="x").size == (800, 400)
    small = decode_image(data, source="x", min_side=64)
    assert small.size == (200, 100)
    full = resize_and_crop(decode_image(data, source="x"), (32, 32))
    difference = image_to_pixels(full) - image_to_pixels(resize_and_crop(small, (32, 32)))
    assert difference.abs().max() < 0.05


def test_resize_and_crop_takes_the_middle_square() -> None:
    image = Image.new("RGB", (90, 30), RED)
    image.paste(GREEN, (30, 0, 60, 30))
    square = resize_and_crop(image, (10, 10))
    assert square.size == (10, 10)
    assert square.getpixel((5, 5)) == GREEN
    assert np.asarray(square)[5, :, 1].min() > 230
    resized_then_cropped = image.resize((30, 10), Image.Resampling.LANCZOS).crop((10, 0, 20, 10))
    assert (image_to_pixels(square) - image_to_pixels(resized_then_cropped)).abs().max() < 0.02
    assert resize_and_crop(image.transpose(Image.Transpose.ROTATE_90), (45, 45)).size == (45, 45)


def test_resize_and_crop_takes_a_window_of_the_same_proportions() -> None:
    image = Image.new("RGB", (90, 30), RED)
    image.paste(GREEN, (22, 0, 68, 30))
    wide = resize_and_crop(image, (10, 15))  # the middle 45 columns
    assert wide.size == (15, 10)
    assert np.asarray(wide)[:, 1:-1, 1].min() > 230
    tall = resize_and_crop(image.transpose(Image.Transpose.ROTATE_90), (15, 10))
    assert tall.size == (10, 15)
    assert np.asarray(tall)[1:-1, :, 1].min() > 230


def test_resize_and_crop_leaves_a_fitting_image_alone() -> None:
    image = noise(8, 8)
    assert resize_and_crop(image, (8, 8)).tobytes() == image.tobytes()
    with pytest.raises(ValueError, match="pixel_size: got 0 x 8"):
        resize_and_crop(image, (0, 8))


def test_pixels_are_in_minus_one_to_one_and_round_trip() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([values, values[::-1], values.T], axis=-1))
    pixels = image_to_pixels(image)
    assert pixels.shape == (3, 16, 16)
    assert pixels.dtype == torch.float32
    assert pixels.min() == -1.0
    assert pixels.max() == 1.0
    assert pixels[0, 0, 1] == pytest.approx(1 / 127.5 - 1)
    [back] = pixels_to_images(pixels[None])
    assert back.tobytes() == image.tobytes()


def test_pixels_to_images_clamps_and_refuses_nonsense() -> None:
    pixels = torch.tensor([-7.0, 7.0, 0.0]).view(1, 3, 1, 1)
    assert pixels_to_images(pixels)[0].getpixel((0, 0)) == (0, 255, 128)
    assert pixels_to_images(pixels.bfloat16().requires_grad_())[0].size == (1, 1)
    with pytest.raises(ValueError, match="NaN"):
        pixels_to_images(torch.full((1, 3, 2, 2), torch.nan))
    with pytest.raises(ValueError, match=r"shape \(1, 4, 2, 2\)"):
        pixels_to_images(torch.zeros(1, 4, 2, 2))


def test_grid_places_images_row_by_row() -> None:
    image_list = [Image.new("RGB", (4, 3), color) for color in (RED, GREEN, BLUE)]
    grid = make_grid(image_list, columns=2)
    assert grid.size == (2 * 4 + 3 * 2, 2 * 3 + 3 * 2)
    assert grid.getpixel((2, 2)) == RED
    assert grid.getpixel((8, 2)) == GREEN
    assert grid.getpixel((2, 7)) == BLUE
    assert grid.getpixel((8, 7)) == WHITE
    assert grid.getpixel((0, 0)) == WHITE
    assert make_grid(image_list[:1], columns=8).size == (8, 7)


def test_grid_captions_stand_under_doubled_images() -> None:
    image = Image.new("RGB", (64, 64), RED)
    captions = ["a red square", "한국어 자막 😀", "", "many words " * 30, "x" * 500]
    captions.append("two\nlines\x00")
    grid = make_grid([image] * 6, columns=3, captions=captions)
    assert grid.width == 3 * 128 + 4 * 2
    assert grid.getpixel((2 + 127, 2 + 127)) == RED
    under = np.asarray(grid.crop((2, 130, 130, 150)))
    assert under.min() < 100, "no ink under the first image"
    gap = np.asarray(grid.crop((130, 0, 132, grid.height)))
    assert gap.min() == 255, "a caption runs into its neighbor"


@pytest.mark.timeout(20)
def test_a_caption_without_spaces_is_cut_at_once() -> None:
    image = Image.new("RGB", (16, 16))
    long, longer = (make_grid([image], columns=1, captions=["x" * n]) for n in (1_000, 2_000_000))
    assert longer.tobytes() == long.tobytes()


def test_grid_refuses_wrong_counts() -> None:
    image = Image.new("RGB", (4, 4))
    with pytest.raises(ValueError, match="2 captions, expected 1"):
        make_grid([image], columns=1, captions=["a", "b"])
    with pytest.raises(ValueError, match="0 images"):
        make_grid([], columns=1)
    with pytest.raises(ValueError, match="0 columns"):
        make_grid([image], columns=0)


def test_to_rgb_keeps_rgb_as_it_is() -> None:
    image = noise(3, 3)
    assert to_rgb(image) is image


def test_hangul_is_rendered_if_a_font_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sheet(caption: str) -> bytes:
        image_grid._wide_font.cache_clear()
        return make_grid([Image.new("RGB", (96, 96))], columns=1, captions=[caption]).tobytes()

    monkeypatch.setattr(image_grid, "_WIDE_FONTS", ("no-such-font.ttf",))
    assert sheet("하트") == sheet("??")
    any_font = tmp_path / "any.ttf"
    any_font.write_bytes(ImageFont.load_default(size=11).path.getvalue())  # type: ignore[union-attr]
    monkeypatch.setattr(image_grid, "_WIDE_FONTS", ("no-such-font.ttf", str(any_font)))
    assert sheet("하트") != sheet("??")  # in the font that was found, whatever it makes of them
    monkeypatch.undo()
    image_grid._wide_font.cache_clear()
    if image_grid._wide_font() is not None:
        assert sheet("하트") != sheet("사과")
    image_grid._wide_font.cache_clear()
