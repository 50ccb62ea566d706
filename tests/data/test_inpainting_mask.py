"""Regions: from a mask, rows or a share to tokens that are redrawn and pixels that stay."""

import re

import pytest
import torch
from PIL import Image, ImageDraw

from dalle_mini_impl.data.inpainting_mask import (
    Region,
    choose_region,
    enlarged,
    mask_pixels,
    paste_back,
    random_cells,
    touched_cells,
)
from dalle_mini_impl.errors import UserError

GRID, SIZE = (4, 4), 16  # a token stands for 4 x 4 pixels


def mask_of(*boxes: tuple[int, int, int, int], size: tuple[int, int] = (16, 16)) -> Image.Image:
    """Black with white boxes (left, top, right, bottom), ends included."""
    mask = Image.new("L", size, 0)
    for box in boxes:
        ImageDraw.Draw(mask).rectangle(box, fill=255)
    return mask


def region_of(
    *, picture_size: tuple[int, int] = (16, 16), seeds: int = 3, **what: object
) -> Region:
    given = {"mask": None, "keep_rows": None, "keep_share": None} | what
    return choose_region(
        **given,  # type: ignore[arg-type]
        picture_size=picture_size,
        size=SIZE,
        grid=GRID,
        seeds=list(range(seeds)),
    )


def test_every_cell_that_white_touches_is_redrawn() -> None:
    region = region_of(mask=mask_of((5, 3, 5, 4), (15, 15, 15, 15)))
    assert region.is_redrawn.shape == (3, 16)
    assert region.is_redrawn[0].nonzero().flatten().tolist() == [1, 5, 15]
    assert region.shown is not None
    assert region.shown.nonzero().tolist() == [[3, 5], [4, 5], [15, 15]]


def test_a_large_masks_single_white_pixel_counts_and_grey_below_half_does_not() -> None:
    mask = mask_of((700, 300, 700, 300), size=(1600, 1600))
    ImageDraw.Draw(mask).rectangle((0, 0, 200, 200), fill=127)
    shown = mask_pixels(mask, picture_size=(1600, 1600), size=SIZE)
    assert shown.nonzero().tolist() == [[3, 7]]


def test_a_mask_is_cropped_as_the_picture_is() -> None:
    mask = mask_of((0, 0, 7, 15), (8, 0, 11, 3), size=(32, 16))  # the left quarter is cut away
    shown = mask_pixels(mask, picture_size=(32, 16), size=SIZE)
    assert touched_cells(shown, grid=GRID).nonzero().flatten().tolist() == [0]


def test_what_is_transparent_counts_as_white() -> None:
    mask = Image.new("RGBA", (16, 16), (0, 0, 0, 255))
    mask.putpixel((2, 9), (0, 0, 0, 0))
    shown = mask_pixels(mask, picture_size=(16, 16), size=SIZE)
    assert shown.nonzero().tolist() == [[9, 2]]


def test_rows_stay_at_the_top() -> None:
    region = region_of(keep_rows=3)
    assert region.is_redrawn[1].nonzero().flatten().tolist() == [12, 13, 14, 15]
    assert region.shown is not None
    assert region.shown.sum(dim=1).tolist() == [0] * 12 + [16] * 4


def test_a_share_stays_elsewhere_for_every_seed() -> None:
    region = region_of(keep_share=0.7, seeds=20)
    assert region.shown is None
    assert region.is_redrawn.sum(dim=1).tolist() == [16 - round(0.7 * 16)] * 20
    assert len(region.is_redrawn.unique(dim=0)) > 15
    assert region.is_redrawn.any(dim=0).all()
    alone = random_cells(0.7, grid=GRID, seeds=[7])
    assert torch.equal(alone[0], region.is_redrawn[7])
    assert random_cells(0.999, grid=GRID, seeds=[1]).sum() == 1  # something is always drawn


def test_cells_become_the_pixels_that_they_stand_for() -> None:
    cells = torch.zeros(16).bool()
    cells[6] = True
    pixels = enlarged(cells, grid=GRID, size=SIZE)
    assert pixels.nonzero().tolist() == [[y, x] for y in range(4, 8) for x in range(8, 12)]
    assert torch.equal(touched_cells(pixels, grid=GRID), cells)


def test_pixels_outside_the_mask_are_the_pictures_own() -> None:
    picture = Image.effect_noise((16, 16), 90).convert("RGB")
    drawn = Image.new("RGB", (16, 16), "red")
    shown = torch.zeros(16, 16).bool()
    shown[2:4, 5] = True
    pasted = paste_back(drawn, picture, shown)
    for y in range(16):
        for x in range(16):
            wanted = drawn if shown[y, x] else picture
            assert pasted.getpixel((x, y)) == wanted.getpixel((x, y))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({}, "mask: got none of them, wanted exactly one of mask, keep_rows, keep_share"),
        (
            {"keep_rows": 1, "keep_share": 0.5},
            "mask: got keep_rows, keep_share, wanted",
        ),
        ({"keep_rows": 0}, "keep_rows: got 0, wanted 1 to 3 rows of tokens"),
        ({"keep_rows": 4}, "keep_rows: got 4, wanted 1 to 3 rows of tokens"),
        ({"keep_share": 0.0}, "keep_share: got 0.0, wanted above 0 and below 1"),
        ({"keep_share": 1.0}, "keep_share: got 1.0, wanted above 0 and below 1"),
        (
            {"mask": mask_of()},
            "mask: no white in the middle square, which is what the model sees of the picture",
        ),
        ({"mask": mask_of(size=(9, 16))}, "mask: got 9x16 pixels, wanted 16x16, as the picture"),
    ],
)
def test_regions_that_are_none_are_refused(what: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        region_of(**what)
