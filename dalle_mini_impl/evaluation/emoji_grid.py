"""Does the model compose? Held-out cells of the emoji grid of role x gender x skin tone.

For 3 x 5 cells of a role all true pictures exist, and some cells were kept from training. A picture
drawn from such a cell's caption is right if, of the role's 15 true pictures, the one of that cell
is nearest in pixels. Chance is 1/15 for the cell, 1/3 for the gender and 1/5 for the tone.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dalle_mini_impl.data.emoji import grid_roles
from dalle_mini_impl.data.images import decode_image, image_to_pixels, resize_and_crop
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.pipeline import TextToImagePipeline

Cell = tuple[str, str]  # gender, skin tone
Key = TypeVar("Key")


@dataclass(frozen=True)
class GridReport:
    """How many held-out cells were drawn right."""

    num_cells: int
    grid_accuracy: float
    """Share of pictures nearest to their own cell, in [0, 1]; chance 1/15."""
    gender_accuracy: float
    """Share whose nearest cell has the right gender; chance 1/3."""
    tone_accuracy: float
    """Share whose nearest cell has the right skin tone; chance 1/5."""
    style_accuracy: float
    """Share nearest to the true picture in the wanted style, of all styles that drew the emoji; 1
    where there is one style only."""
    captions: list[str]
    drawn: list[Image.Image]
    true: list[Image.Image]


def evaluate_grid(
    pipeline: TextToImagePipeline,
    data_dir: Path,
    *,
    num_candidates: int = 1,
    seed: int = 0,
    language: str = "en",
    style: str = "twemoji",
    **settings: Any,
) -> GridReport:
    """Draw every held-out cell once and find the nearest true picture.

    Args:
        pipeline: The model.
        data_dir: Folder that ``prepare_emoji.py`` wrote.
        num_candidates: Pictures drawn for each one that is judged, chosen by caption gain.
        seed: Of each picture.
        language: Captions of the cells: ``en`` or ``ko``.
        style: Whose pictures are wanted; captions name every style but twemoji.
        **settings: Fields of ``SamplingConfig``.

    Returns:
        Accuracies and the pictures.

    Raises:
        UserError: If the folder holds no emoji data, or no cell was held out.
    """
    metadata = data_dir / "metadata.jsonl"
    if not metadata.is_file():
        raise UserError(f"data: no {metadata}; wanted the folder that prepare_emoji.py wrote")
    try:
        lines = metadata.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        roles = grid_roles(rows, style=style)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"data: {metadata}: {type(error).__name__}: {error}; "
            "wanted the folder that prepare_emoji.py wrote"
        ) from None
    cells = [
        (role, cell, row)
        for role, grid in roles.items()
        for cell, row in grid.items()
        if row["split"] == "test_compose"
    ]
    if not cells:
        raise UserError(
            f"data: {metadata} has no held-out grid cells (split test_compose) in {style}"
        )
    captions = [row["text" if language == "en" else "text_ko"] for _, _, row in cells]
    drawn = pipeline(captions, seed=seed, num_candidates=num_candidates, **settings).images

    size = pipeline.vqvae.config.image_size
    truth = {
        role: {cell: _read(data_dir / row["file_name"], size) for cell, row in grid.items()}
        for role, grid in roles.items()
    }
    places = [(role, cell) for role, cell, _ in cells]
    shares = judge_drawings(drawn, places, truth)
    true = [truth[role][cell] for role, cell in places]
    in_all_styles = [
        {other["style"]: data_dir / other["file_name"] for other in rows if _same(other, row)}
        for _, _, row in cells
    ]
    right_style = sum(
        _nearest(
            image_to_pixels(image),
            {name: image_to_pixels(_read(path, size)) for name, path in files.items()},
        )
        == style
        for image, files in zip(drawn, in_all_styles, strict=True)
    )
    return GridReport(len(cells), *shares, right_style / len(cells), captions, drawn, true)


def _same(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Say whether two rows show the same emoji, in whatever style."""
    return row["hexcode"] == other["hexcode"]


def judge_drawings(
    drawn: Sequence[Image.Image],
    places: Sequence[tuple[str, Cell]],
    truth: Mapping[str, Mapping[Cell, Image.Image]],
) -> tuple[float, float, float]:
    """Find the nearest true picture of each drawing among those of its role.

    Args:
        drawn: Drawings, as large as the true pictures.
        places: Role and cell that each drawing was asked for.
        truth: The pictures of every role.

    Returns:
        Shares of drawings that are nearest to their own cell, to any of its gender, and to any of
        its skin tone.
    """
    right = torch.zeros(3)
    for image, (role, (gender, tone)) in zip(drawn, places, strict=True):
        pixels = {cell: image_to_pixels(picture) for cell, picture in truth[role].items()}
        nearest_gender, nearest_tone = _nearest(image_to_pixels(image), pixels)
        hits = (nearest_gender == gender, nearest_tone == tone)
        right += torch.tensor([float(all(hits)), float(hits[0]), float(hits[1])])
    cell_share, gender_share, tone_share = (right / len(drawn)).tolist()
    return cell_share, gender_share, tone_share


def _nearest(pixels: Float[Tensor, "3 height width"], truth: Mapping[Key, Tensor]) -> Key:
    """Return the name of the true picture with the smallest squared error."""
    return min(truth, key=lambda name: float((truth[name] - pixels).square().mean()))


def _read(path: Path, size: int) -> Image.Image:
    return resize_and_crop(decode_image(path.read_bytes(), source=str(path)), size)
