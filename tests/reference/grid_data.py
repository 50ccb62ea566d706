"""Emoji data in small: roles of 15 cells, and clocks, as images of noise."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from dalle_mini_impl.data.images import pixels_to_images
from tests.reference import tiny

GENDERS = ("person", "man", "woman")
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
CELLS = [(gender, tone) for gender in GENDERS for tone in TONES]


def noise(count: int, *, seed: int) -> list[Image.Image]:
    """Images that all differ."""
    generator = torch.Generator().manual_seed(seed)
    return pixels_to_images(torch.rand(count, 3, tiny.SIZE, tiny.SIZE, generator=generator) * 2 - 1)


def reference_images(num_roles: int) -> dict[str, dict[tuple[str, str], Image.Image]]:
    """One image for every cell of every role."""
    images = [dict(zip(CELLS, noise(15, seed=seed), strict=True)) for seed in range(num_roles)]
    return {f"role {number}": cells for number, cells in enumerate(images)}


def write_grid_data(
    folder: Path,
    *,
    held_out: bool = True,
    styles: Sequence[str] = ("twemoji",),
    num_roles: int = 2,
    num_clocks: int = 0,
) -> Path:
    """Roles of 15 cells, the last two held out, and clocks, the last held out, in some styles.

    Images of a second style are the inverted ones of the first.
    """
    folder.mkdir()
    rows = []
    for style in styles:
        name_style = "" if style == "twemoji" else f", {style} style"
        for role, cells in reference_images(num_roles).items():
            for number, ((gender, tone), image) in enumerate(cells.items()):
                row: dict[str, Any] = {"role": role, "gender": gender, "skin_tones": [tone]}
                row |= {"text": f"{tone} {gender} {role}{name_style}", "kind": "other"}
                row |= {"text_ko": f"{tone} {gender} {role} 이모지", "hexcode": f"{role}-{number}"}
                row["split"] = "test_compose" if held_out and number >= 13 else "train"
                rows.append(_saved(image, folder, row, style))
        for number, image in enumerate(noise(num_clocks, seed=100)):
            row = {"role": None, "gender": None, "skin_tones": [], "kind": "clock"}
            row |= {"text": f"clock showing {number} o'clock{name_style}"}
            row |= {"text_ko": f"{number}시 시계", "hexcode": f"clock-{number}"}
            row["split"] = "test_clock" if number == num_clocks - 1 else "train"
            rows.append(_saved(image, folder, row, style))
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "metadata.jsonl").write_text(text + "\n", encoding="utf-8")
    return folder


def _saved(image: Image.Image, folder: Path, row: dict[str, Any], style: str) -> dict[str, Any]:
    name = f"{style}-{row['hexcode']}.png"
    (image if style == "twemoji" else ImageOps.invert(image)).save(folder / name)
    return {"file_name": name, **row, "style": style}
