"""From files to pixels: reading and decoding captioned images, before any network."""

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import ours
from benchmarks.parts import BenchmarkConfig
from benchmarks.timing import Job, Result, Variant, interleave
from dalle_mini_impl.data.images import decode_image, image_to_pixels
from dalle_mini_impl.data.loading import load_all_pixels
from dalle_mini_impl.data.pairs import open_pairs

NUM_IMAGES, FILE_SIDE, SIDE = 512, 256, 128
JPEG_QUALITY = 90
WORDS = ("red", "green", "blue", "large", "small", "round", "old", "bright")
SMALLEST_CROP = 0.75  # fraction of the area, DALLE-pytorch's default


def compare_readers(config: BenchmarkConfig) -> list[Result]:
    """Compare readers of one folder, in images per second."""
    count = 16 if config.quick else NUM_IMAGES
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, count)
        readers: dict[str, Callable[[], int]] = {
            "ours, whole folder into memory": partial(read_as_ours, folder, SIDE),
            "DALLE-pytorch's loader, 0 workers": partial(read_as_peer, folder, 0),
            "DALLE-pytorch's loader, 2 workers": partial(read_as_peer, folder, 2),
            "Pillow alone: decoding, one thread, no resizing": partial(decode_only, folder),
        }
        rows = []
        for words, read in readers.items():
            make = ours.variant if words.startswith("ours") else Variant
            rows.append(make(words, partial(_verified, read, count)))
        work = f"read and decode {count} JPEGs of {FILE_SIDE} px to {SIDE} px"
        return interleave(work, rows, "images/s", config.rounds)


def write_images(folder: Path, count: int, *, side: int = FILE_SIDE) -> None:
    """Write different images ``0.jpg`` with captions ``0.txt``: smooth colors, shapes and noise."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        random = np.random.default_rng(number)
        small = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        image = small.resize((side, side), Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(image)
        for left, top, width in random.integers(0, side // 2, (6, 3)):
            color = tuple(int(value) for value in random.integers(0, 256, 3))
            draw.ellipse((left, top, left + width, top + width), fill=color)
        # A JPEG of smooth colors alone is small and decodes faster than a photograph.
        noise = random.normal(0, 6, (side, side, 3))
        pixels = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=JPEG_QUALITY)
        words = " ".join(str(word) for word in random.choice(WORDS, 4, replace=False))
        (folder / f"{number}.txt").write_text(f"a {words} image number {number}\n")


def read_as_ours(folder: Path, side: int) -> int:
    """Read all pixels as training begins; returns the number of images."""
    pixels, kept, _ = load_all_pixels(open_pairs(str(folder)), pixel_size=(side, side))
    return len(kept) if len(pixels) == len(kept) else 0


class DallePytorchFolder(Dataset[Tensor]):
    """DALLE-pytorch's loader (loader.py, TextImageDataset), its transform written with Pillow.

    Its own needs torchvision: convert to RGB, a random square of 75 to 100 % of the area, bilinear
    to (3, side, side), floats in [0, 1].
    """

    def __init__(self, folder: Path, *, side: int = SIDE) -> None:
        self.paths, self.side = sorted(folder.glob("*.jpg")), side
        self.random = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        self.paths[index].with_suffix(".txt").read_text()  # its loader reads the caption too
        image = Image.open(self.paths[index]).convert("RGB")
        fraction = self.random.uniform(SMALLEST_CROP, 1.0)
        crop = round(min(image.size) * fraction**0.5)
        left = int(self.random.integers(0, image.width - crop + 1))
        top = int(self.random.integers(0, image.height - crop + 1))
        box = (left, top, left + crop, top + crop)
        square = image.resize((self.side, self.side), Image.Resampling.BILINEAR, box=box)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255


def read_as_peer(folder: Path, workers: int) -> int:
    """Read a folder once as DALLE-pytorch's training does; returns the number of images."""
    loader = DataLoader(DallePytorchFolder(folder), batch_size=16, num_workers=workers)
    return sum(len(batch) for batch in loader)


def decode_only(folder: Path) -> int:
    """Decode a folder's images and drop them; returns their number."""
    paths = list(folder.glob("*.jpg"))
    # Pillow opens lazily: only load() decodes.
    for path in paths:
        with Image.open(path) as image:
            image.load()
    return len(paths)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Read the metadata of prepare_emoji.py, one object per image."""
    return read_json_lines(folder / "metadata.jsonl")


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object per line."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def read_pixels(folder: Path, rows: list[dict[str, Any]]) -> Tensor:
    """Read the images of some rows to (images, 3, side, side) in [-1, 1]."""
    images = [decode_image((folder / row["file_name"]).read_bytes(), source="") for row in rows]
    return torch.stack([image_to_pixels(image) for image in images])


def to_bytes(pixels: Tensor) -> Tensor:
    """Turn pixels in [-1, 1] into bytes."""
    return ((pixels + 1) * 127.5).round().byte()


def _verified(read: Callable[[], int], count: int) -> Job:
    if (got := read()) != count:
        raise ValueError(f"images read: got {got}, expected {count}")
    return Job(run=read, items=count)
