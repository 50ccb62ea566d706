"""Images on disk: PNG files that remember how they were made."""

import json
import os
import re
import unicodedata
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

MAX_NAME_LENGTH = 60  # characters of the prompt
MAX_NAME_BYTES = 180  # of them, in UTF-8: 60 in Hangul; file systems allow 255 for a whole name


def image_name(number: int, prompt: str, seed: int) -> str:
    """Name an image's file by the number of its prompt, the prompt and the seed.

    Args:
        number: Of the prompt among all that were generated into the folder; keeps similar ones apart.
        prompt: Any text: letters of every script and digits stay, all else becomes dashes.
        seed: Of the image.

    Returns:
        A file name, never a path.
    """
    prompt = unicodedata.normalize("NFC", prompt).lower()
    words = re.sub(r"[\W_]+", "-", prompt).strip("-")[:MAX_NAME_LENGTH]
    words = words.encode()[:MAX_NAME_BYTES].decode(errors="ignore").strip("-")
    return f"{number:04d}-{words or 'image'}_{seed}.png"


def grid_name(number: int) -> str:
    """Name the grid of a call by the number of its first prompt.

    Args:
        number: As in ``image_name``.

    Returns:
        A file name.
    """
    return f"grid-{number:04d}.png"


def next_number(folder: Path) -> int:
    """Find the first number that no image or grid of a folder has.

    Args:
        folder: May hold the files of earlier calls, and others.

    Returns:
        0 for an empty folder.
    """
    names = (path.name for path in folder.iterdir())
    found = (re.fullmatch(r"(?:grid-(\d{4,9})|(\d{4,9})-.*)\.png", name) for name in names)
    return max((int(match[1] or match[2]) + 1 for match in found if match), default=0)


def save_image(
    image: Image.Image, path: Path, *, prompt: str, seed: int, metadata: dict[str, Any]
) -> None:
    """Write a PNG with its prompt, seed and settings in its metadata.

    The text chunk ``parameters`` is what common viewers show; ``dalle_mini_impl`` holds the same
    as JSON.

    Args:
        image: The image.
        path: Where to.
        prompt: What it was generated from.
        seed: Its seed.
        metadata: Everything else that decided it.
    """
    facts = {"prompt": prompt, "seed": seed, **metadata}
    info = PngInfo()
    line = ", ".join(f"{key}: {value}" for key, value in facts.items() if key != "prompt")
    info.add_itxt("parameters", f"{prompt}\n{line}")
    info.add_itxt("dalle_mini_impl", json.dumps(facts, ensure_ascii=False))
    # Under its name it is whole, whatever ends the program meanwhile.
    unfinished = path.with_name(f".{path.name}")
    try:
        image.save(unfinished, format="png", pnginfo=info)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
