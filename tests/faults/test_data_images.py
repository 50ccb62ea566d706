"""Fault 16: images of every mode, format and damage are decoded right, or refused by name."""

import contextlib
import functools
import io
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from dalle_mini_impl.data.images import BadImageError, decode_image
from dalle_mini_impl.data.loading import load_all_pixels
from dalle_mini_impl.data.pairs import open_pairs
from tests.faults.hostile import Bomb, encoded, nothing_comes_of_it, png_chunk, png_of

Color = tuple[int, int, int]
RED: Color = (200, 30, 60)
WHITE: Color = (255, 255, 255)
SIZE = (16, 12)


def flat(mode: str, color: object) -> Image.Image:
    return Image.new(mode, SIZE, color)  # type: ignore[arg-type]


def red() -> Image.Image:
    return flat("RGB", RED)


def png(image: Image.Image, **options: Any) -> bytes:
    return encoded(image, "PNG", **options)


def jpeg(**options: Any) -> bytes:
    return encoded(red(), "JPEG", quality=95, **options)


def red_palette() -> Image.Image:
    image = flat("P", 1)
    image.putpalette([0, 0, 0, *RED])
    return image


def raw_png(bits: int, color: int, pixel: bytes, **options: Any) -> bytes:
    """One pixel, as raw samples."""
    return png_of((1, 1), bits=bits, color=color, rows=b"\0" + pixel, **options)


def changed(data: bytes, position: int, value: bytes) -> bytes:
    return data[:position] + value + data[position + len(value) :]


ANIMATED = {"save_all": True, "append_images": [flat("RGB", (0, 0, 255))]}
CLEAR = flat("RGBA", (9, 9, 9, 0))


def strange_exif(kind: int, count: int, value: bytes) -> bytes:
    """An orientation that is no number from 1 to 8."""
    entry = struct.pack(">HHHI", 1, 0x0112, kind, count) + value + bytes(4)
    return jpeg(exif=b"Exif\0\0MM\0*\0\0\0\x08" + entry)


# Name -> a file, and the color that it shows.
GOOD: dict[str, tuple[Callable[[], bytes], Color]] = {
    "png 1 bit": (lambda: png(flat("1", 1)), WHITE),
    "png 2 bit gray": (lambda: raw_png(2, 0, b"\x80"), (170, 170, 170)),
    "png gray": (lambda: png(flat("L", 100)), (100, 100, 100)),
    "png gray and alpha": (lambda: png(flat("LA", (0, 0))), WHITE),
    "png gray with a transparent value": (lambda: png(flat("L", 9), transparency=9), WHITE),
    "png palette": (lambda: png(red_palette()), RED),
    "png palette with a transparent entry": (lambda: png(red_palette(), transparency=1), WHITE),
    "png rgb": (lambda: png(red()), RED),
    "png rgb with a transparent color": (lambda: png(red(), transparency=RED), WHITE),
    "png rgba half transparent": (lambda: png(flat("RGBA", (0, 0, 0, 128))), (127, 127, 127)),
    "png 16 bits": (lambda: png(Image.fromarray(np.full((12, 16), 2**15, np.uint16))), (128,) * 3),
    "png 16 bit rgb": (lambda: raw_png(16, 2, bytes([200, 0, 30, 0, 60, 0])), RED),
    "png 16 bit rgba": (lambda: raw_png(16, 6, bytes([9, 9, 9, 9, 9, 9, 0, 0])), WHITE),
    "png 16 bit gray and alpha": (lambda: raw_png(16, 4, bytes([9, 9, 0, 0])), WHITE),
    "png interlaced": (lambda: raw_png(8, 2, bytes(RED), interlace=1), RED),
    "png animated": (lambda: png(red(), **ANIMATED), RED),
    "png, unknown chunk": (lambda: raw_png(8, 2, bytes(RED), chunks=png_chunk(b"abCd", b"x")), RED),
    "png, 60 kB of text": (
        lambda: raw_png(8, 2, bytes(RED), chunks=png_chunk(b"tEXt", b"k\0" + b"x" * 60_000)),
        RED,
    ),
    "png with junk behind it": (lambda: png(red()) + b"junk" * 999, RED),
    "jpeg": (jpeg, RED),
    "jpeg gray": (lambda: encoded(flat("L", 100), "JPEG"), (100, 100, 100)),
    "jpeg cmyk": (lambda: encoded(red().convert("CMYK"), "JPEG", quality=95), RED),
    "jpeg progressive": (lambda: jpeg(progressive=True), RED),
    "jpeg with junk behind it": (lambda: jpeg() + b"junk" * 999, RED),
    "jpeg with a broken exif block": (lambda: jpeg(exif=b"Exif\0\0not a tiff header"), RED),
    "jpeg with a broken color profile": (lambda: jpeg(icc_profile=b"no profile" * 300), RED),
    "jpeg with 60 kB of comment": (lambda: jpeg(comment=b"x" * 60_000), RED),
    "jpeg with two images (mpo)": (lambda: encoded(red(), "MPO", quality=95, **ANIMATED), RED),
    "jpeg turned by 0": (lambda: strange_exif(3, 1, bytes(4)), RED),
    "jpeg turned by 9": (lambda: strange_exif(3, 1, b"\0\x09\0\0"), RED),
    "jpeg turned by a word": (lambda: strange_exif(2, 3, b"up\0\0"), RED),
    "webp": (lambda: encoded(red(), "WEBP", quality=100), RED),
    "webp, transparent": (lambda: encoded(CLEAR, "WEBP", lossless=True, exact=True), WHITE),
    "webp animated": (lambda: encoded(red(), "WEBP", **ANIMATED, quality=100), RED),
    "bmp": (lambda: encoded(red(), "BMP"), RED),
    "bmp 1 bit": (lambda: encoded(flat("1", 1), "BMP"), WHITE),
    "bmp palette": (lambda: encoded(red_palette(), "BMP"), RED),
    "bmp 32 bit": (lambda: encoded(flat("RGBA", (*RED, 255)), "BMP"), RED),
    "bmp, top down": (lambda: changed(encoded(red(), "BMP"), 22, struct.pack("<i", -SIZE[1])), RED),
    "one pixel": (lambda: png(Image.new("RGB", (1, 1), RED)), RED),
    "3000 by 1": (lambda: png(Image.new("RGB", (3000, 1), RED)), RED),
}


@pytest.mark.parametrize("name", GOOD)
def test_odd_but_whole_images_show_their_color(name: str) -> None:
    make, color = GOOD[name]
    decoded = decode_image(make(), source="x")
    assert decoded.mode == "RGB"
    values = np.asarray(decoded).reshape(-1, 3).astype(int)
    assert np.abs(values - color).max() <= 6  # JPEG and CMYK are not exact


@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_turned_by_exif_stands_upright(orientation: int) -> None:
    values = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(values), "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert decode_image(data, source="x").tobytes() == expected.tobytes()


@functools.cache
def noise(format: str) -> bytes:
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return encoded(Image.fromarray(values), format)


def cut(format: str, fraction: float) -> bytes:
    data = noise(format)
    return data[: int(len(data) * fraction)]


def huge_jpeg() -> bytes:
    data = encoded(red(), "JPEG")
    position = data.index(b"\xff\xc0") + 5  # height and width of the frame header
    return changed(data, position, struct.pack(">HH", 65_500, 65_500))


def huge_bmp() -> bytes:
    return changed(encoded(red(), "BMP"), 18, struct.pack("<ii", 2**31 - 1, 2**31 - 1))


def huge_webp() -> bytes:
    size = struct.pack("<I", 16_383)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + size + size
    return b"RIFF" + struct.pack("<I", len(body)) + body


@functools.cache
def text_bomb(kind: bytes, head: bytes) -> bytes:
    bomb = png_chunk(kind, head + zlib.compress(bytes(80_000_000), 9))
    return png_of((4, 4), chunks=bomb)


NOT_AN_IMAGE = "not an image in one of the formats JPEG, PNG, WEBP, BMP"
DAMAGED = r"damaged or refused \("
EITHER = f"{NOT_AN_IMAGE}|{DAMAGED}"
PIXELS = r"\d+x\d+ pixels, expected at most"
SYSTEM = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch sentinel) (w) file\n"
ENTITY = b'<!DOCTYPE s [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>'

# Name -> a file, and the reason that is given for it.
BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", r"empty file \(0 bytes\)"),
    "web page": (lambda: b"<html><body>404 not found</body></html>", NOT_AN_IMAGE),
    "answer of a server": (lambda: b'{"error": "rate limit"}', NOT_AN_IMAGE),
    "git lfs pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\n", NOT_AN_IMAGE),
    "gif named jpg": (lambda: encoded(flat("P", 0), "GIF"), NOT_AN_IMAGE),
    "tiff": (lambda: encoded(red(), "TIFF"), NOT_AN_IMAGE),
    "icon": (lambda: encoded(red(), "ICO"), NOT_AN_IMAGE),
    "pcx": (lambda: encoded(red(), "PCX"), NOT_AN_IMAGE),
    "ppm": (lambda: encoded(red(), "PPM"), NOT_AN_IMAGE),
    "tga": (lambda: encoded(red(), "TGA"), NOT_AN_IMAGE),
    "jpeg 2000": (lambda: encoded(red(), "JPEG2000"), NOT_AN_IMAGE),
    "eps that runs a command": (lambda: SYSTEM, NOT_AN_IMAGE),
    "pdf": (lambda: b"%PDF-1.7\n1 0 obj\n", NOT_AN_IMAGE),
    "svg that reads a file": (lambda: ENTITY, NOT_AN_IMAGE),
    "psd": (lambda: b"8BPS\0\1" + bytes(60), NOT_AN_IMAGE),
    "heic": (lambda: b"\0\0\0\x18ftypheic" + bytes(60), NOT_AN_IMAGE),
    "zip": (lambda: b"PK\3\4" + bytes(60), NOT_AN_IMAGE),
    "gzip": (lambda: b"\x1f\x8b\x08" + bytes(60), NOT_AN_IMAGE),
    "program": (lambda: b"\x7fELF\2\1\1" + bytes(60), NOT_AN_IMAGE),
    "shell script": (lambda: b"#!/bin/sh\ntouch sentinel\n", NOT_AN_IMAGE),
    "pickle": (lambda: pickle.dumps(Bomb(Path("sentinel"))), NOT_AN_IMAGE),
    "zeros": (lambda: bytes(4096), NOT_AN_IMAGE),
    "ones": (lambda: b"\xff" * 4096, NOT_AN_IMAGE),
    "signature of a png alone": (lambda: noise("PNG")[:8], EITHER),
    "png cut at a tenth": (lambda: cut("PNG", 0.1), DAMAGED),
    "png cut in the middle": (lambda: cut("PNG", 0.5), DAMAGED),
    "png cut near the end": (lambda: cut("PNG", 0.9), DAMAGED),
    "jpeg cut in its header": (lambda: noise("JPEG")[:20], EITHER),
    "jpeg cut in the middle": (lambda: cut("JPEG", 0.5), DAMAGED),
    "jpeg cut near the end": (lambda: cut("JPEG", 0.9), DAMAGED),
    "webp cut in the middle": (lambda: cut("WEBP", 0.5), EITHER),
    "bmp cut in the middle": (lambda: cut("BMP", 0.5), DAMAGED),
    "png with a flipped bit in its header": (lambda: changed(noise("PNG"), 18, b"\x01"), EITHER),
    "png with a chunk of a bad checksum": (lambda: changed(noise("PNG"), 60, b"\0\0\0\0"), DAMAGED),
    "png without pixels": (lambda: png_of((100, 100)), DAMAGED),
    "png of width 0": (lambda: png_of((0, 4)), EITHER),
    "png of unknown depth": (lambda: png_of((4, 4), bits=7), EITHER),
    "png of 2 147 483 647 a side": (lambda: png_of((2**31 - 1, 2**31 - 1)), f"{PIXELS}|{DAMAGED}"),
    "png of 900 megapixels": (lambda: png_of((30_000, 30_000)), f"{PIXELS}|{DAMAGED}"),
    "png of 88 megapixels": (lambda: png_of((12_000, 7_400)), PIXELS),
    "png of 51 megapixels": (lambda: png_of((10_000, 5_100)), PIXELS),
    "png of 16 385 by 1": (lambda: png_of((16_385, 1)), PIXELS),
    "jpeg that claims 4 290 megapixels": (huge_jpeg, f"{PIXELS}|{DAMAGED}"),
    "webp that claims 268 megapixels": (huge_webp, f"{PIXELS}|{DAMAGED}|{NOT_AN_IMAGE}"),
    "bmp that claims 2 147 483 647 a side": (huge_bmp, f"{PIXELS}|{DAMAGED}"),
    "png with 80 MB in a zTXt chunk": (lambda: text_bomb(b"zTXt", b"k\0\0"), DAMAGED),
    "png with 80 MB in an iTXt chunk": (lambda: text_bomb(b"iTXt", b"k\0\1\0\0\0"), DAMAGED),
    "png with 80 MB in its color profile": (lambda: text_bomb(b"iCCP", b"k\0\0"), DAMAGED),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_refused_with_path_and_reason(name: str, here: Path) -> None:
    make, reason = BAD[name]
    with nothing_comes_of_it(here):
        with pytest.raises(BadImageError, match=rf"^some/dir/pic\.jpg: ({reason})") as caught:
            decode_image(make(), source="some/dir/pic.jpg")
        assert caught.value.source == "some/dir/pic.jpg"
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("position", [0.3, 0.6, 0.9])
def test_a_flipped_byte_in_a_jpeg_is_decoded_or_refused(position: float) -> None:
    # Nothing in a JPEG tells; what counts is that nothing else happens.
    data = noise("JPEG")
    data = changed(data, int(len(data) * position), b"\x55\xaa")
    with contextlib.suppress(BadImageError):
        assert decode_image(data, source="x").size == (64, 64)


def test_all_bad_images_of_a_folder_are_named(tmp_path: Path) -> None:
    for name, (make, _) in (GOOD | BAD).items():
        (tmp_path / f"{name}.jpg").write_bytes(make())
        (tmp_path / f"{name}.txt").write_text(name)
    pairs = open_pairs(str(tmp_path))
    assert len(pairs) == len(GOOD) + len(BAD)
    results = [load_all_pixels(pairs, pixel_size=(4, 4), max_bad_fraction=0.9) for _ in range(2)]
    pixels, kept, bad = results[0]
    assert {pairs[index].path for index in kept} == {f"{name}.jpg" for name in GOOD}
    assert {record.path for record in bad} == {f"{name}.jpg" for name in BAD}
    assert all(record.reason for record in bad)
    assert results[1][1:] == (kept, bad)
    assert results[1][0].equal(pixels)
