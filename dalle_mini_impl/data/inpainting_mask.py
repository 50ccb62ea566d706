"""Which part of an image is inpainted: by mask, rows or fraction; and what stays of the image.

A mask is an image of the same size, white where it is generated anew (black stays), as in
other inpainting programs. Image tokens stand for patches: every patch that white touches is
inpainted. In the result the black pixels are those of the image itself, not of its reconstruction.
"""

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange, reduce
from jaxtyping import Bool
from PIL import Image
from torch import Tensor

from dalle_mini_impl.data.images import middle_window, resize_and_crop, to_rgb
from dalle_mini_impl.errors import UserError

WHITE_FROM = 128  # of 255


@dataclass(frozen=True)
class InpaintingMask:
    """The part to generate anew in each of several versions of one image."""

    is_masked: Bool[Tensor, "batch image_length"]
    """Which tokens, raster order; every row has the same number of them."""
    shown: Bool[Tensor, "height width"] | None
    """Where generated pixels show; elsewhere the source image's do. None: everywhere."""


def build_inpainting_mask(
    *,
    mask: Image.Image | None,
    keep_rows: int | None,
    keep_fraction: float | None,
    source_size: tuple[int, int],
    pixel_size: tuple[int, int],
    grid: tuple[int, int],
    seeds: list[int],
) -> InpaintingMask:
    """Find what is inpainted from exactly one of ``mask``, ``keep_rows`` and ``keep_fraction``.

    Args:
        mask: White where the image is inpainted.
        keep_rows: Rows of tokens at the top that stay.
        keep_fraction: Fraction of the tokens that stay, others for each seed.
        source_size: Width and height of the image, in pixels.
        pixel_size: Of the model's images: pixels along (height, width).
        grid: Image tokens along (height, width).
        seeds: One per image to generate.

    Raises:
        UserError: Not exactly one is given, it is out of range, or it inpaints nothing.
    """
    check_part(mask=mask, keep_rows=keep_rows, keep_fraction=keep_fraction, source_size=source_size)
    if keep_fraction is not None:
        return InpaintingMask(random_cells(keep_fraction, grid=grid, seeds=seeds), None)
    if keep_rows is not None:
        cells = rows_below(keep_rows, grid=grid)
        shown = enlarged(cells, grid=grid, pixel_size=pixel_size)
    elif mask is not None:
        shown = mask_pixels(mask, pixel_size=pixel_size)
        cells = touched_cells(shown, grid=grid)
    # keep_rows always leaves a row; a mask may be black, or white only where the crop cuts.
    if not cells.any():
        raise UserError(
            "mask: no white in the middle part, which is what the model sees of the image; "
            "expected white where it is inpainted"
        )
    return InpaintingMask(cells.expand(len(seeds), -1), shown)


def check_part(
    *,
    mask: Image.Image | None,
    keep_rows: int | None,
    keep_fraction: float | None,
    source_size: tuple[int, int],
) -> None:
    """Refuse what no model can inpaint; arguments and error as ``build_inpainting_mask``."""
    ways = {"mask": mask, "keep_rows": keep_rows, "keep_fraction": keep_fraction}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise UserError(f"inpainting: got {got}, expected exactly one of {', '.join(ways)}")
    if mask is not None and mask.size != source_size:
        raise UserError(
            f"mask: got {mask.width}x{mask.height} pixels, "
            f"expected {source_size[0]}x{source_size[1]}, as the image has"
        )
    if keep_rows is not None and keep_rows < 1:
        raise UserError(f"keep_rows: got {keep_rows}, expected at least 1 row of tokens")
    if keep_fraction is not None and not 0 < keep_fraction < 1:
        raise UserError(f"keep_fraction: got {keep_fraction}, expected above 0 and below 1")


def mask_pixels(mask: Image.Image, *, pixel_size: tuple[int, int]) -> Bool[Tensor, "height width"]:
    """Scale a mask to the model's images: True where any of its own pixels is white.

    Transparent counts as black: it is what an editor leaves untouched on a new layer.
    """
    if mask.has_transparency_data:
        layer = mask.convert("RGBA")
        mask = Image.alpha_composite(Image.new("RGBA", mask.size, "black"), layer)
    white = to_rgb(mask).convert("L").point([255 * (value >= WHITE_FROM) for value in range(256)])
    # In float32, where one white pixel of a thousand is not rounded away.
    height, width = pixel_size
    box = middle_window(white.size, pixel_size)
    fractions = white.convert("F").resize((width, height), Image.Resampling.BOX, box=box)
    return torch.from_numpy(np.array(fractions) > 0)


def touched_cells(
    pixels: Bool[Tensor, "height width"], *, grid: tuple[int, int]
) -> Bool[Tensor, " image_length"]:
    """Mark the cells of the token grid, raster order, that hold a pixel of a mask."""
    rows, columns = grid
    blocks = "(rows down) (columns right) -> (rows columns)"
    return reduce(pixels.byte(), blocks, "max", rows=rows, columns=columns).bool()


def rows_below(num_rows: int, *, grid: tuple[int, int]) -> Bool[Tensor, " image_length"]:
    """Mark all rows of tokens but the first ones, which stay."""
    if num_rows >= grid[0]:
        raise UserError(f"keep_rows: got {num_rows}, expected 1 to {grid[0] - 1} rows of tokens")
    return torch.arange(grid[0]).repeat_interleave(grid[1]) >= num_rows


def random_cells(
    fraction: float, *, grid: tuple[int, int], seeds: list[int]
) -> Bool[Tensor, "batch image_length"]:
    """Mark all cells but a random ``fraction``, different for each seed; at least one per image."""
    # At least one cell is generated, whatever the fraction rounds to.
    length = grid[0] * grid[1]
    num_kept = min(round(fraction * length), length - 1)
    is_masked = torch.ones(len(seeds), length, dtype=torch.bool)
    for row, seed in zip(is_masked, seeds, strict=True):
        # A generator per seed: an image does not depend on the others of its call.
        order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
        row[order[:num_kept]] = False
    return is_masked


def enlarged(
    cells: Bool[Tensor, " image_length"], *, grid: tuple[int, int], pixel_size: tuple[int, int]
) -> Bool[Tensor, "height width"]:
    """Enlarge cells of the token grid to the pixels that they stand for."""
    down, right = pixel_size[0] // grid[0], pixel_size[1] // grid[1]
    rows = rearrange(cells, "(rows columns) -> rows columns", rows=grid[0])
    return rows.repeat_interleave(down, 0).repeat_interleave(right, 1)


def paste_back(
    generated: Image.Image, image: Image.Image, masked_pixels: Bool[Tensor, "height width"]
) -> Image.Image:
    """Put the image's own pixels back where ``masked_pixels`` is False."""
    mask = Image.fromarray(masked_pixels.numpy().astype(np.uint8) * 255)
    # Cropped and scaled as the model saw it.
    seen = resize_and_crop(image, (generated.height, generated.width))
    return Image.composite(generated, seen, mask)
