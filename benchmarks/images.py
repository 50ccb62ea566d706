"""Made-up photographs with captions: a folder that every program of this kind can read."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIDE = 256  # pixels
QUALITY = 90  # of JPEG
WORDS = ("red", "green", "blue", "large", "small", "round", "old", "bright")


def write_images(folder: Path, count: int, *, side: int = SIDE) -> None:
    """Write ``0.jpg`` with ``0.txt`` and so on: smooth colors, shapes and noise.

    Args:
        folder: Made if missing.
        count: Number of images; every one differs.
        side: Height and width in pixels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        random = np.random.default_rng(number)
        small = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        image = small.resize((side, side), Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(image)
        for left, top, width in random.integers(0, side // 2, (6, 3)):
            colour = tuple(int(value) for value in random.integers(0, 256, 3))
            draw.ellipse((left, top, left + width, top + width), fill=colour)
        noise = random.normal(0, 6, (side, side, 3))
        pixels = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=QUALITY)
        words = " ".join(str(word) for word in random.choice(WORDS, 4, replace=False))
        (folder / f"{number}.txt").write_text(f"a {words} image number {number}\n")
