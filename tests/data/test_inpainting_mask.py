"""Regions: from a mask, rows or a fraction to tokens that are inpainted and pixels that stay."""

import re
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from dalle_mini_impl.data.inpainting_mask import (
    InpaintingMask,
    build_inpainting_mask,
    enlarged,
    mask_pixels,
    paste_back,
    random_cells,
    touched_cells,
)
from dalle_mini_impl.errors import UserError

GRID, SIZE = (4, 4), (16, 16)  # a token stands for 4 x 4 pixels


def mask_of(*boxes: tuple[int, int, int, int], size: tuple[int, int] = (16, 16)) -> Image.Image:
    """Black with white boxes (left, top, right, bottom), ends included."""
    mask = Image.new("L", size, 0)
    for box in boxes:
        ImageDraw.Draw(mask).rectangle(box, fill=255)
    return mask


def inpainting_mask_of(
    *, source_size: tuple[int, int] = (16, 16), seeds: int = 3, **what: object
) -> InpaintingMask:
    options: Any = {"mask": None, "keep_rows": None, "keep_fraction": None} | what
    options |= {"pixel_size": SIZE, "grid": GRID, "seeds": list(range(seeds))}
    return build_inpainting_mask(source_size=source_size, **options)


def cells_of(is_masked: torch.Tensor) -> list[int]:
    return is_masked.nonzero().flatten().tolist()


def test_every_touched_cell_is_masked() -> None:
    inpainting_mask = inpainting_mask_of(mask=mask_of((5, 3, 5, 4), (15, 15, 15, 15)))
    assert inpainting_mask.is_masked.shape == (3, 16)
    assert cells_of(inpainting_mask.is_masked[0]) == [1, 5, 15]
    assert inpainting_mask.shown is not None
    assert inpainting_mask.shown.nonzero().tolist() == [[3, 5], [4, 5], [15, 15]]


def test_single_white_pixel_counts_but_dark_gray_does_not() -> None:
    mask = mask_of((700, 300, 700, 300), size=(1600, 1600))
    ImageDraw.Draw(mask).rectangle((0, 0, 200, 200), fill=127)
    shown = mask_pixels(mask, pixel_size=SIZE)
    assert shown.nonzero().tolist() == [[3, 7]]


def test_mask_is_cropped_as_the_image_is() -> None:
    mask = mask_of((0, 0, 7, 15), (8, 0, 11, 3), size=(32, 16))  # the left quarter is cut away
    shown = mask_pixels(mask, pixel_size=SIZE)
    assert cells_of(touched_cells(shown, grid=GRID)) == [0]


def test_a_mask_for_images_that_are_not_square() -> None:
    """Two rows of three tokens, of 4 x 4 pixels each; the image is higher than the window."""
    options: Any = {"pixel_size": (8, 12), "grid": (2, 3), "seeds": [0]}
    options |= {"keep_fraction": None, "source_size": (24, 32)}
    mask = mask_of((9, 17, 9, 17), (0, 0, 23, 7), size=(24, 32))  # the second is cut away
    found = build_inpainting_mask(mask=mask, keep_rows=None, **options)
    assert cells_of(found.is_masked[0]) == [4]
    assert found.shown is not None
    assert found.shown.nonzero().tolist() == [[4, 4]]
    found = build_inpainting_mask(mask=None, keep_rows=1, **options)
    assert cells_of(found.is_masked[0]) == [3, 4, 5]
    assert found.shown is not None
    assert found.shown.sum(dim=1).tolist() == [0] * 4 + [12] * 4
    image = Image.effect_noise((24, 32), 90).convert("RGB")
    pasted = paste_back(Image.new("RGB", (12, 8), "red"), image, found.shown)
    window = image.resize((12, 16), Image.Resampling.LANCZOS).crop((0, 4, 12, 12))
    window.paste("red", (0, 4, 12, 8))
    assert pasted.tobytes() == window.tobytes()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_stays(mode: str) -> None:
    """White on a transparent layer, whatever color the transparent pixels hide."""
    layer = Image.new("RGBA", (16, 16), (255, 255, 255, 0))
    layer.putpixel((2, 9), (255, 255, 255, 255))
    layer.putpixel((5, 9), (0, 0, 0, 255))
    if mode == "P":
        layer = layer.convert("L").point(lambda _: 0).convert("P")
        layer.putpixel((2, 9), 1)
        layer.putpalette([255] * 6)
        layer.info["transparency"] = 0
    else:
        layer = layer.convert(mode)
    shown = mask_pixels(layer, pixel_size=SIZE)
    assert shown.nonzero().tolist() == [[9, 2]]


def test_rows_stay_at_the_top() -> None:
    inpainting_mask = inpainting_mask_of(keep_rows=3)
    assert cells_of(inpainting_mask.is_masked[1]) == [12, 13, 14, 15]
    assert inpainting_mask.shown is not None
    assert inpainting_mask.shown.sum(dim=1).tolist() == [0] * 12 + [16] * 4


def test_keep_fraction_differs_by_seed() -> None:
    inpainting_mask = inpainting_mask_of(keep_fraction=0.7, seeds=20)
    assert inpainting_mask.shown is None
    assert inpainting_mask.is_masked.sum(dim=1).tolist() == [16 - round(0.7 * 16)] * 20
    assert len(inpainting_mask.is_masked.unique(dim=0)) > 15
    assert inpainting_mask.is_masked.any(dim=0).all()
    alone = random_cells(0.7, grid=GRID, seeds=[7])
    assert torch.equal(alone[0], inpainting_mask.is_masked[7])
    assert random_cells(0.999, grid=GRID, seeds=[1]).sum() == 1  # something is always generated


def test_cells_become_the_pixels_that_they_stand_for() -> None:
    cells = torch.zeros(16).bool()
    cells[6] = True
    pixels = enlarged(cells, grid=GRID, pixel_size=SIZE)
    assert pixels.nonzero().tolist() == [[y, x] for y in range(4, 8) for x in range(8, 12)]
    assert torch.equal(touched_cells(pixels, grid=GRID), cells)


def test_pixels_outside_the_mask_are_the_images_own() -> None:
    image = Image.effect_noise((16, 16), 90).convert("RGB")
    generated = Image.new("RGB", (16, 16), "red")
    shown = torch.zeros(16, 16).bool()
    shown[2:4, 5] = True
    expected = image.copy()
    expected.paste("red", (5, 2, 6, 4))
    assert paste_back(generated, image, shown).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({}, "inpainting: got none, expected exactly one of mask, keep_rows, keep_fraction"),
        ({"keep_rows": 1, "keep_fraction": 0.5}, "got keep_rows and keep_fraction, expected"),
        ({"keep_rows": 0}, "keep_rows: got 0, expected at least 1 row of tokens"),
        ({"keep_rows": 4}, "keep_rows: got 4, expected 1 to 3 rows of tokens"),
        ({"keep_fraction": 0.0}, "keep_fraction: got 0.0, expected above 0 and below 1"),
        ({"keep_fraction": 1.0}, "keep_fraction: got 1.0, expected above 0 and below 1"),
        ({"mask": mask_of()}, "mask: no white in the middle part, which is what the model sees"),
        ({"mask": mask_of(size=(9, 16))}, "mask: got 9x16 pixels, expected 16x16, as the image"),
    ],
)
def test_invalid_masks_are_refused(what: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        inpainting_mask_of(**what)
