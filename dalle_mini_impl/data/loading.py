"""The pixels of captioned images: read, decoded and scaled, in threads."""

import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from dalle_mini_impl.data.images import (
    BadImageError,
    decode_image,
    image_to_pixels,
    is_big,
    resize_and_crop,
)
from dalle_mini_impl.data.pairs import Pairs
from dalle_mini_impl.data.readers.records import SkippedRecord, are_too_many, printable
from dalle_mini_impl.errors import UserError

Result = TypeVar("Result")
_MAX_LISTED = 5


def read_pixels(pairs: Pairs, index: int, size: int) -> Float[Tensor, "channels size size"]:
    """Reads, decodes, scales and crops one image.

    Args:
        pairs: Where it is.
        index: Which pair.
        size: Side of the square in pixels.

    Returns:
        Pixels in [-1, 1].

    Raises:
        BadImageError: The image cannot be read.
    """
    return image_to_pixels(_read_square(pairs, index, size))


def _read_square(pairs: Pairs, index: int, size: int) -> Image.Image:
    return _square(pairs.read_image(index), pairs[index].path, size)


def _square(data: bytes, path: str, size: int) -> Image.Image:
    # Half of the final resampling may be left to the JPEG decoder without a visible difference.
    return resize_and_crop(decode_image(data, source=path, min_side=2 * size), size)


def each_image(
    pairs: Pairs, work: Callable[[int, bytes, str], Result], *, min_side: int | None = None
) -> Generator[Result | SkippedRecord, None, None]:
    """Works on all images, in one thread per processor.

    An image of 50 million pixels takes 400 MB while it is decoded, and the system's memory
    allocator keeps that for the thread. So the calling thread does the big ones itself.

    Args:
        pairs: The set.
        work: Called with index, bytes and path; may raise BadImageError.
        min_side: What `work` gives to `decode_image`.

    Yields:
        What `work` returns, in order; a record for each image that cannot be read.
    """

    def attempt(index: int, *, takes_big: bool = False) -> Result | SkippedRecord | None:
        try:
            data = pairs.read_image(index)
            if not takes_big and is_big(data, min_side=min_side):
                return None
            return work(index, data, pairs[index].path)
        except BadImageError as error:
            return SkippedRecord(printable(error.source), printable(error.reason))

    executor = ThreadPoolExecutor(os.cpu_count())
    try:
        for index, result in enumerate(executor.map(attempt, range(len(pairs)))):
            whole = attempt(index, takes_big=True) if result is None else result
            assert whole is not None
            yield whole
    finally:
        executor.shutdown(cancel_futures=True)


def load_all_pixels(
    pairs: Pairs,
    *,
    image_size: int,
    max_bad_fraction: float = 0.1,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[UInt8[Tensor, "kept 3 image_size image_size"], list[int], list[SkippedRecord]]:
    """Loads all images of a small set into memory, decoding in one thread per processor.

    Args:
        pairs: The set.
        image_size: Side of the square images in pixels.
        max_bad_fraction: Largest fraction of unreadable images taken, in [0, 1].
        progress: Called with (done, total) after each image, in the calling thread.

    Returns:
        Bytes of the images that could be read, their indices in `pairs`, and the others.

    Raises:
        UserError: More bad images than `max_bad_fraction`, or nothing but bad ones.
    """
    total = len(pairs)
    pixels = torch.empty((total, 3, image_size, image_size), dtype=torch.uint8)

    def load(index: int, data: bytes, path: str) -> int:
        array = np.array(_square(data, path, image_size))
        pixels[index] = rearrange(torch.from_numpy(array), "height width rgb -> rgb height width")
        return index

    kept: list[int] = []
    bad: list[SkippedRecord] = []
    with closing(each_image(pairs, load, min_side=2 * image_size)) as results:
        for done, result in enumerate(results, start=1):
            if isinstance(result, SkippedRecord):
                bad.append(result)
            else:
                kept.append(result)
            # One broken image may be a large fraction of a small split.
            if are_too_many(len(bad), total, max_bad_fraction) or len(bad) == total:
                raise UserError(_too_many_bad(bad, done, total, max_bad_fraction))
            if progress is not None:
                progress(done, total)
    return (pixels[kept] if bad else pixels), kept, bad


def _too_many_bad(
    bad: Sequence[SkippedRecord], num_read: int, total: int, max_bad_fraction: float
) -> str:
    shown = "; ".join(f"{record.path}: {record.reason}" for record in bad[:_MAX_LISTED])
    return (
        f"{len(bad)} of the first {num_read} images (of {total}) cannot be read, more than "
        f"max_bad_fraction = {max_bad_fraction} allows: {shown}"
    )
