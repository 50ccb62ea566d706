"""Strict image decoding, square crops, pixel tensors and contact sheets."""

import functools
import io
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont, ImageOps

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

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(
    width: int, height: int, *, bits: int = 8, colour: int = 0, chunks: bytes = b""
) -> bytes:
    """A PNG whose header claims a size, with next to no data behind it."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = png_chunk(b"IHDR", header) + chunks + png_chunk(b"IDAT", zlib.compress(bytes(64)))
    return b"\x89PNG\r\n\x1a\n" + body + png_chunk(b"IEND", b"")


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP"])
def test_lossless_formats_come_back_exactly(format: str) -> None:
    image = noise(7, 5)
    options = {"lossless": True} if format == "WEBP" else {}
    decoded = decode_image(encoded(image, format, **options), source="x")
    assert decoded.mode == "RGB"
    assert decoded.tobytes() == image.tobytes()


def test_transparency_is_laid_over_white() -> None:
    image = Image.new("RGBA", (3, 1))
    for x, colour in enumerate([(255, 0, 0, 255), (0, 0, 0, 0), (0, 0, 0, 128)]):
        image.putpixel((x, 0), colour)
    for format in ("PNG", "WEBP"):
        options = {"lossless": True, "exact": True} if format == "WEBP" else {}
        decoded = decode_image(encoded(image, format, **options), source="x")
        assert decoded.getpixel((0, 0)) == RED
        assert decoded.getpixel((1, 0)) == WHITE
        assert decoded.getpixel((2, 0)) == (127, 127, 127)


def test_palette_with_a_transparent_entry() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    decoded = decode_image(encoded(image, "PNG", transparency=0), source="x")
    assert decoded.getpixel((0, 0)) == WHITE
    assert decoded.getpixel((1, 0)) == BLUE


def test_colour_key_transparency_of_rgb_and_grey_images() -> None:
    image = Image.new("RGB", (2, 1), GREEN)
    image.putpixel((0, 0), RED)
    decoded = decode_image(encoded(image, "PNG", transparency=RED), source="x")
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [WHITE, GREEN]
    grey = Image.new("L", (2, 1), 7)
    grey.putpixel((0, 0), 9)
    decoded = decode_image(encoded(grey, "PNG", transparency=9), source="x")
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [WHITE, (7, 7, 7)]


def test_cmyk_jpeg_keeps_its_colours() -> None:
    cmyk = Image.new("RGB", (16, 16), (200, 30, 60)).convert("CMYK")
    decoded = decode_image(encoded(cmyk, "JPEG", quality=95), source="x")
    assert decoded.mode == "RGB"
    assert np.abs(np.array(decoded.getpixel((8, 8))) - (200, 30, 60)).max() <= 6


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 257, 300, 32768, 65535]], dtype=np.uint16)
    decoded = decode_image(encoded(Image.fromarray(values), "PNG"), source="x")
    red = [int(value) for value in np.asarray(decoded)[0, :, 0]]
    assert red == [0, 1, 1, 128, 255]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = Image.new("L", (4, 4), 255).convert(mode)
    assert decode_image(encoded(image, "PNG"), source="x").getpixel((1, 1)) == WHITE


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int) -> None:
    image = noise(6, 4)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    decoded = decode_image(data, source="x")
    assert decoded.tobytes() == expected.tobytes()
    assert decoded.size == ((4, 6) if orientation >= 5 else (6, 4))


def test_broken_exif_does_not_cost_the_image() -> None:
    data = encoded(noise(6, 4), "JPEG", exif=b"Exif\x00\x00not a tiff header")
    assert decode_image(data, source="x").size == (6, 4)


@functools.cache
def bad_files() -> dict[str, bytes]:
    jpeg = encoded(noise(64, 64), "JPEG")
    text_bomb = png_chunk(b"zTXt", b"k\x00\x00" + zlib.compress(bytes(80_000_000), 9))
    return {
        "empty": b"",
        "html": b"<html><body>404 not found</body></html>",
        "gif_named_jpg": encoded(Image.new("P", (4, 4)), "GIF"),
        "tiff": encoded(noise(4, 4), "TIFF"),
        "truncated_jpeg": jpeg[: len(jpeg) // 2],
        "truncated_png": encoded(noise(64, 64), "PNG")[:3000],
        "header_only": jpeg[:20],
        "bomb_900_megapixels": png_of(30_000, 30_000),
        "bomb_89_megapixels": png_of(12_000, 7_400),
        "long_thin": encoded(Image.new("1", (16_385, 1)), "PNG"),
        "no_pixel_data": png_of(100, 100),
        "text_chunk_bomb": png_of(4, 4, chunks=text_bomb),
        "zero_width": png_of(0, 4),
    }


@pytest.mark.parametrize("name", bad_files())
def test_bad_files_are_one_error_with_path_and_reason(name: str) -> None:
    with pytest.raises(BadImageError, match=r"^some/dir/pic\.jpg: .+") as caught:
        decode_image(bad_files()[name], source="some/dir/pic.jpg")
    assert isinstance(caught.value, UserError)
    assert caught.value.source == "some/dir/pic.jpg"


def test_the_size_limit_is_checked_before_decoding() -> None:
    data = png_of(100, 100)  # decoding this one fails, so another message proves the order
    with pytest.raises(BadImageError, match="100x100 pixels, expected at most 9999 pixels"):
        decode_image(data, source="x", max_pixels=9999)
    good = encoded(noise(100, 100), "PNG")
    assert decode_image(good, source="x", max_pixels=10_000).size == (100, 100)


def test_bad_image_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(BadImageError("a.jpg", "damaged")))
    assert (error.source, error.reason, str(error)) == ("a.jpg", "damaged", "a.jpg: damaged")


def test_big_jpegs_may_be_decoded_smaller() -> None:
    data = encoded(Image.linear_gradient("L").resize((800, 400)).convert("RGB"), "JPEG")
    assert decode_image(data, source="x").size == (800, 400)
    small = decode_image(data, source="x", min_side=64)
    assert small.size == (200, 100)
    full = resize_and_crop(decode_image(data, source="x"), 32)
    difference = image_to_pixels(full) - image_to_pixels(resize_and_crop(small, 32))
    assert difference.abs().max() < 0.05


def test_resize_and_crop_takes_the_middle_square() -> None:
    image = Image.new("RGB", (90, 30), RED)
    image.paste(GREEN, (30, 0, 60, 30))
    square = resize_and_crop(image, 10)
    assert square.size == (10, 10)
    assert square.getpixel((5, 5)) == GREEN
    assert np.asarray(square)[5, :, 1].min() > 230
    resized_then_cropped = image.resize((30, 10), Image.Resampling.LANCZOS).crop((10, 0, 20, 10))
    assert (image_to_pixels(square) - image_to_pixels(resized_then_cropped)).abs().max() < 0.02
    assert resize_and_crop(image.transpose(Image.Transpose.ROTATE_90), 45).size == (45, 45)


def test_resize_and_crop_leaves_a_fitting_image_alone() -> None:
    image = noise(8, 8)
    assert resize_and_crop(image, 8).tobytes() == image.tobytes()
    with pytest.raises(ValueError, match="size is 0"):
        resize_and_crop(image, 0)


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
    image_list = [Image.new("RGB", (4, 3), colour) for colour in (RED, GREEN, BLUE)]
    grid = make_grid(image_list, columns=2, padding=1)
    assert grid.size == (2 * 4 + 3, 2 * 3 + 3)
    assert grid.getpixel((1, 1)) == RED
    assert grid.getpixel((6, 1)) == GREEN
    assert grid.getpixel((1, 5)) == BLUE
    assert grid.getpixel((6, 5)) == WHITE
    assert grid.getpixel((0, 0)) == WHITE
    assert make_grid(image_list[:1], columns=8, padding=1).size == (6, 5)


def test_grid_captions_stand_under_doubled_images() -> None:
    image = Image.new("RGB", (64, 64), RED)
    long_word = "x" * 500
    captions = [
        "a red square",
        "한국어 자막 😀",
        "",
        "many words " * 30,
        long_word,
        "two\nlines\x00",
    ]
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


def test_sixteen_bit_colour_key() -> None:
    values = np.array([[500, 40_000]], dtype=np.uint16)
    decoded = decode_image(encoded(Image.fromarray(values), "PNG", transparency=500), source="x")
    assert np.asarray(decoded)[0, :, 0].tolist() == [255, 156]


def test_to_rgb_keeps_rgb_as_it_is() -> None:
    image = noise(3, 3)
    assert to_rgb(image) is image


def test_hangul_is_rendered_if_a_font_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sheet(caption: str) -> bytes:
        image_grid._wide_font.cache_clear()
        return make_grid([Image.new("RGB", (96, 96))], columns=1, captions=[caption]).tobytes()

    monkeypatch.setattr(images, "_WIDE_FONTS", ("no-such-font.ttf",))
    assert sheet("하트") == sheet("??")
    any_font = tmp_path / "any.ttf"
    any_font.write_bytes(ImageFont.load_default(size=11).path.getvalue())  # type: ignore[union-attr]
    monkeypatch.setattr(images, "_WIDE_FONTS", ("no-such-font.ttf", str(any_font)))
    assert sheet("하트") != sheet("??")  # in the font that was found, whatever it makes of them
    monkeypatch.undo()
    image_grid._wide_font.cache_clear()
    if image_grid._wide_font() is not None:
        assert sheet("하트") != sheet("사과")
    image_grid._wide_font.cache_clear()
