"""Images in and out: strict decoding to RGB, crops, pixel tensors.

Bytes from outside are hostile until decoded: the size is judged from the header before any pixel
is read, only four formats are tried, and every failure becomes one ``BadImageError`` with the
image's name. Color profiles are ignored; everything is taken as sRGB.
"""

import io
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from PIL import Image
from PIL.ExifTags import Base as ExifTag
from torch import Tensor

from dalle_mini_impl.errors import UserError

Fit: TypeAlias = Literal["crop", "pad", "stretch"]
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MAX_SIDE = 16384
MAX_PIXELS = 50_000_000
WHITE = (255, 255, 255)
_BIG_PIXELS = 8_000_000
_STRIP = 64  # rows
# EXIF orientation -> the turn that undoes it (TIFF 6.0, tag 274).
_EXIF_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImageError(UserError):
    """An image that cannot be read; the message holds its path and the reason."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(f"{source}: {reason}")
        self.source = source
        self.reason = reason

    def __reduce__(self) -> tuple[type["BadImageError"], tuple[str, str]]:
        """Rebuild from both arguments, so that the error survives pickling between processes."""
        return BadImageError, (self.source, self.reason)


def decode_image(data: bytes, *, source: str, min_side: int | None = None) -> Image.Image:
    """Decode a JPEG, PNG, WebP or BMP file to an upright RGB image, or say why it cannot.

    Transparency is laid over white, EXIF rotation is applied, 16-bit gray is rounded to 8 bits.
    With ``min_side``, a JPEG may be decoded 2, 4 or 8 times smaller (much faster), as long as both
    sides keep at least ``min_side`` pixels.

    Raises:
        BadImageError: Unknown format, too large, damaged; it names ``source``.
    """
    if not data:
        raise BadImageError(source, "empty file (0 bytes)")
    # Decoders fed hostile bytes have raised nearly every type of exception, so all are caught.
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image, source)  # from the header: no pixel is decoded yet
            # Only JPEG has a draft mode: its decoder skips high frequencies.
            if min_side is not None:
                image.draft(None, (min_side, min_side))
            image.load()
            turn = _EXIF_TURNS.get(_exif_orientation(image))
            rgb = to_rgb(image)
            return rgb if turn is None else rgb.transpose(turn)
    except BadImageError:
        raise
    except Image.UnidentifiedImageError as error:
        formats = ", ".join(FORMATS)
        raise BadImageError(source, f"not an image in one of the formats {formats}") from error
    except MemoryError as error:
        raise BadImageError(source, "not enough memory to decode it") from error
    except Exception as error:
        reason = f"damaged or refused ({type(error).__name__}: {error})"
        raise BadImageError(source, reason) from error


def is_big(data: bytes, *, min_side: int | None = None) -> bool:
    """Tell from the header whether an image takes much memory while it is decoded.

    That is above 8 million pixels, with ``min_side`` as for ``decode_image``; a bad image is not
    big.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if min_side is not None:
                image.draft(None, (min_side, min_side))
            return image.width * image.height > _BIG_PIXELS
    except Exception:  # decode_image says what is wrong with it
        return False


def describe_image(data: bytes) -> str:
    """Read format and mode, as stored, in Pillow's words ("JPEG CMYK").

    ``data`` is an image that ``decode_image`` takes.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return f"{image.format} {image.mode}"


def read_image_file(path: Path, *, field: str) -> Image.Image:
    """Read one image that a user names by the option ``field``; UserError if it cannot be read."""
    try:
        return decode_image(path.read_bytes(), source=str(path))
    except BadImageError as error:
        raise UserError(f"{field}: {error}") from None
    except OSError as error:
        raise UserError(f"{field}: {path}: {error.strerror}; expected an image file") from None


def _check_size(image: Image.Image, source: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        limits = f"at most {MAX_PIXELS} pixels in all and {MAX_SIDE} a side"
        raise BadImageError(source, f"{width}x{height} pixels, expected {limits}")


def _exif_orientation(image: Image.Image) -> int:
    # Broken EXIF blocks are common in the wild and say nothing about the pixels.
    try:
        orientation = image.getexif().get(ExifTag.Orientation, 1)
    except Exception:
        return 1
    return orientation if isinstance(orientation, int) else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, with transparent parts over white."""
    # Modes I, I;16, I;16B: sixteen bits, which convert("RGB") would clip.
    if image.mode.startswith("I"):
        return _sixteen_bit_to_rgb(image)
    # A color key in the header counts, too; modes alone would miss it.
    if image.has_transparency_data:
        background = Image.new("RGB", image.size, WHITE)
        for top in range(0, image.height, _STRIP):  # in strips: each form needs four bytes a pixel
            bottom = min(top + _STRIP, image.height)
            strip = image.crop((0, top, image.width, bottom)).convert("RGBA")
            background.paste(strip, (0, top), mask=strip)
        return background
    return image if image.mode == "RGB" else image.convert("RGB")


def _sixteen_bit_to_rgb(image: Image.Image) -> Image.Image:
    # Pillow's own conversion clips at 255 or cuts the low byte; this one rounds.
    values = np.asarray(image)
    gray = np.empty(values.shape, dtype=np.uint8)
    for top in range(0, len(values), _STRIP):  # in strips: the sums need four bytes a pixel
        strip = values[top : top + _STRIP].astype(np.int32).clip(0, 65535)
        gray[top : top + _STRIP] = (strip + 128) // 257
    transparent_value = image.info.get("transparency")
    if isinstance(transparent_value, int):
        gray[values == transparent_value] = 255
    return Image.fromarray(gray).convert("RGB")


def resize_and_crop(image: Image.Image, pixel_size: tuple[int, int]) -> Image.Image:
    """Scale the middle window of an image to ``pixel_size``, (height, width), with Lanczos.

    Both are done in one resampling of the window, so a long thin image costs no memory.
    """
    height, width = pixel_size
    if min(pixel_size) < 1:
        raise ValueError(f"pixel_size: got {height} x {width}, expected at least 1 pixel a side")
    # With box, no enlarged image of the whole is ever made.
    box = middle_window(image.size, pixel_size)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def resize_to_fit(image: Image.Image, pixel_size: tuple[int, int], fit: Fit) -> Image.Image:
    """Make an image ``pixel_size``, (height, width), by one of three ways for other proportions.

    ``crop`` keeps the middle window, ``pad`` puts white beside the whole image, ``stretch`` changes
    its proportions.
    """
    if fit == "crop":
        return resize_and_crop(image, pixel_size)
    height, width = pixel_size
    scale = min(width / image.width, height / image.height)
    inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    scaled = image.resize((width, height) if fit == "stretch" else inner, Image.Resampling.LANCZOS)
    if scaled.size == (width, height):
        return scaled
    canvas = Image.new("RGB", (width, height), "white")
    canvas.paste(scaled, ((width - scaled.width) // 2, (height - scaled.height) // 2))
    return canvas


def middle_window(
    size: tuple[int, int], pixel_size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """Find the box (left, top, right, bottom) that the model sees of an image (width, height).

    It is the largest one in the middle with the proportions of ``pixel_size``, (height, width).
    """
    width = min(size[0], size[1] * pixel_size[1] / pixel_size[0])
    height = min(size[1], size[0] * pixel_size[0] / pixel_size[1])
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    return left, top, left + width, top + height


def window_fraction(size: tuple[int, int], pixel_size: tuple[int, int]) -> float:
    """Return which fraction of an image (width, height) its middle window is, in (0, 1]."""
    left, top, right, bottom = middle_window(size, pixel_size)
    return (right - left) * (bottom - top) / (size[0] * size[1])


def image_to_pixels(image: Image.Image) -> Float[Tensor, "channels height width"]:
    """Turn an image of any mode into pixels in [-1, 1], three channels."""
    values = torch.from_numpy(np.array(to_rgb(image)))
    return bytes_to_pixels(rearrange(values, "height width channels -> channels height width"))


def bytes_to_pixels(images: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Turn bytes into pixels in [-1, 1], on their device."""
    return images.float() / 127.5 - 1


def pixels_to_images(
    pixels: Float[Tensor, "batch channels height width"],
) -> list[Image.Image]:
    """Turn pixels in [-1, 1], three channels, on any device, into RGB images.

    Values outside are clamped; ValueError for another shape or NaN.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels have shape {tuple(pixels.shape)}, expected (batch, 3, h, w)")
    # The cast of NaN to a byte is undefined: black here, white there.
    if pixels.isnan().any():
        raise ValueError("pixels hold NaN, expected numbers in [-1, 1]")
    scaled = ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round()
    # Rounded: a plain cast would darken every image by half a step.
    arrays = scaled.to(device="cpu", dtype=torch.uint8)
    arrays = rearrange(arrays, "batch channels height width -> batch height width channels")
    return [Image.fromarray(array.numpy()) for array in arrays.contiguous()]
