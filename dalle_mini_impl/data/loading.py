"""The pixels of captioned images: read, decoded and scaled, in threads."""

import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

import numpy as np
import torch
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from dalle_mini_impl.data.images import (
    BadImageError,
    Fit,
    decode_image,
    is_big,
    resize_to_fit,
)
from dalle_mini_impl.data.pairs import Pairs
from dalle_mini_impl.data.readers.records import SkippedRecord, are_too_many, printable
from dalle_mini_impl.errors import UserError

Result = TypeVar("Result")
_MAX_LISTED = 5


def decode_to_fit(
    data: bytes, path: str, pixel_size: tuple[int, int], *, fit: Fit = "crop"
) -> Image.Image:
    """Decode an encoded image and make it ``pixel_size``, (height, width), RGB.

    Raises:
        BadImageError: As ``decode_image``.
    """
    min_side = smallest_decoded(pixel_size)
    return resize_to_fit(decode_image(data, source=path, min_side=min_side), pixel_size, fit)


def smallest_decoded(pixel_size: tuple[int, int]) -> int:
    """Return the shortest side of a decoded image that is to be scaled to ``pixel_size``."""
    # Half of the final resampling may be left to the JPEG decoder without a visible difference. The
    # longer side counts for both, as the file may hold the image turned.
    return 2 * max(pixel_size)


def each_image(
    pairs: Pairs, work: Callable[[int, bytes, str], Result], *, min_side: int | None = None
) -> Generator[Result | SkippedRecord, None, None]:
    """Call ``work`` with index, bytes and path of every image, in one thread per processor.

    ``min_side`` is what ``work`` gives to ``decode_image``. Yields what ``work`` returns, in order,
    and a record for each image that cannot be read (``work`` raises BadImageError).
    """

    def attempt(index: int, *, takes_big: bool = False) -> Result | SkippedRecord | None:
        try:
            data = pairs.read_image(index)
            if not takes_big and is_big(data, min_side=min_side):
                return None
            return work(index, data, pairs[index].path)
        except BadImageError as error:
            # In a thread an exception would end the whole read.
            return SkippedRecord(printable(error.source), printable(error.reason))

    executor = ThreadPoolExecutor(os.cpu_count())
    try:
        # An image of 50 million pixels takes 400 MB while it is decoded, and the system's memory
        # allocator keeps that for the thread. So this thread decodes the big ones itself.
        for index, result in enumerate(executor.map(attempt, range(len(pairs)))):
            whole = attempt(index, takes_big=True) if result is None else result
            assert whole is not None
            yield whole
    finally:
        # A caller that stops early must not wait for the rest of the images.
        executor.shutdown(cancel_futures=True)


def load_all_pixels(
    pairs: Pairs,
    *,
    pixel_size: tuple[int, int],
    max_bad_fraction: float = 0.1,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[UInt8[Tensor, "kept 3 height width"], list[int], list[SkippedRecord]]:
    """Load all images into memory as bytes, decoding in one thread per processor.

    They are made ``pixel_size``, (height, width), in the way that ``pairs.fit`` names. ``progress``
    is called with (done, total) after each image, in the calling thread. Returns the images that
    could be read, their indices in ``pairs``, and the others.

    Raises:
        UserError: More bad images than ``max_bad_fraction``, in [0, 1], or nothing but bad ones.
    """
    total = len(pairs)
    # Room for all, filled by the threads in place; copied once if some are bad.
    pixels = torch.empty((total, 3, *pixel_size), dtype=torch.uint8)

    def load(index: int, data: bytes, path: str) -> int:
        array = np.array(decode_to_fit(data, path, pixel_size, fit=pairs.fit))
        pixels[index] = rearrange(torch.from_numpy(array), "height width rgb -> rgb height width")
        return index

    kept: list[int] = []
    bad: list[SkippedRecord] = []
    with closing(each_image(pairs, load, min_side=smallest_decoded(pixel_size))) as results:
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
