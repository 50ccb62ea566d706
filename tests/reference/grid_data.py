"""Emoji data in small: roles of 15 cells, and clocks, as images of noise."""

import json
from collections.abc import Sequence
from pathlib import Path

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
    roles = (f"role {number}" for number in range(num_roles))
    return {
        role: dict(zip(CELLS, noise(15, seed=seed), strict=True)) for seed, role in enumerate(roles)
    }


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
                row = {
                    "file_name": f"{style}-{role}-{number}.png",
                    "text": f"{tone} {gender} {role}{name_style}",
                    "text_ko": f"{tone} {gender} {role} 이모지",
                    "split": "test_compose" if held_out and number >= 13 else "train",
                    "role": role,
                    "gender": gender,
                    "skin_tones": [tone],
                    "hexcode": f"{role}-{number}",
                    "kind": "other",
                }
                rows.append({**row, "style": style})
                _save(image, folder / str(row["file_name"]), style)
        for number, image in enumerate(noise(num_clocks, seed=100)):
            row = {
                "file_name": f"{style}-clock-{number}.png",
                "text": f"clock showing {number} o'clock{name_style}",
                "text_ko": f"{number}시 시계",
                "split": "test_clock" if number == num_clocks - 1 else "train",
                "role": None,
                "gender": None,
                "skin_tones": [],
                "hexcode": f"clock-{number}",
                "kind": "clock",
            }
            rows.append({**row, "style": style})
            _save(image, folder / str(row["file_name"]), style)
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "metadata.jsonl").write_text(text + "\n", encoding="utf-8")
    return folder


def _save(image: Image.Image, path: Path, style: str) -> None:
    (image if style == "twemoji" else ImageOps.invert(image)).save(path)
