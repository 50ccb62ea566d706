"""Pictures on disk: PNG files that remember how they were made."""

import json
import re
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

MAX_NAME_LENGTH = 60  # characters of the prompt
MAX_NAME_BYTES = 180  # of them, in UTF-8: 60 in Hangul; file systems allow 255 for a whole name


def picture_name(number: int, prompt: str, seed: int) -> str:
    """Name a picture's file by the place of its prompt, the prompt and the seed.

    Args:
        number: Place of the prompt in the call, which keeps similar prompts apart.
        prompt: Any text: letters of every script and digits stay, all else becomes dashes.
        seed: Of the picture.

    Returns:
        A file name, never a path.
    """
    words = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:MAX_NAME_LENGTH]
    words = words.encode()[:MAX_NAME_BYTES].decode(errors="ignore").strip("-")
    return f"{number:04d}-{words or 'picture'}_{seed}.png"


def save_picture(
    image: Image.Image, path: Path, *, prompt: str, seed: int, settings: dict[str, Any]
) -> None:
    """Write a PNG with its prompt, seed and settings in its metadata.

    The text chunk ``parameters`` is what common viewers show; ``dalle_mini_impl`` holds the same
    as JSON.

    Args:
        image: The picture.
        path: Where to.
        prompt: What it was drawn from.
        seed: Its seed.
        settings: Everything else that decided it.
    """
    facts = {"prompt": prompt, "seed": seed, **settings}
    info = PngInfo()
    line = ", ".join(f"{key}: {value}" for key, value in facts.items() if key != "prompt")
    info.add_itxt("parameters", f"{prompt}\n{line}")
    info.add_itxt("dalle_mini_impl", json.dumps(facts, ensure_ascii=False))
    image.save(path, pnginfo=info)
