"""From files to pixels: reading and decoding captioned images, before any network."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import ours_pictures
from benchmarks.config import BenchmarkConfig
from benchmarks.images import write_images
from benchmarks.timing import Job, Result, Variant, interleave

NUM_IMAGES, SIDE = 512, 128
SMALLEST_CROP = 0.75  # fraction of the area, DALLE-pytorch's default


class DallePytorchFolder(Dataset[Tensor]):
    """DALLE-pytorch's loader (loader.py, TextImageDataset), its transform written with Pillow.

    Its own needs torchvision: convert to RGB, a random square of 75 to 100 % of the area, bilinear
    to the expected size, to a float tensor.
    """

    def __init__(self, folder: Path, *, side: int = SIDE) -> None:
        """List the images.

        Args:
            folder: Holds ``x.jpg`` beside ``x.txt``.
            side: Of the tensors, in pixels.
        """
        self.paths, self.side = sorted(folder.glob("*.jpg")), side
        self.random = np.random.default_rng(0)

    def __len__(self) -> int:
        """Count the images."""
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """Read the caption, decode and crop the image; in [0, 1]."""
        self.paths[index].with_suffix(".txt").read_text()
        image = Image.open(self.paths[index]).convert("RGB")
        fraction = self.random.uniform(SMALLEST_CROP, 1.0)
        crop = round(min(image.size) * fraction**0.5)
        left = int(self.random.integers(0, image.width - crop + 1))
        top = int(self.random.integers(0, image.height - crop + 1))
        square = image.resize(
            (self.side, self.side),
            Image.Resampling.BILINEAR,
            box=(left, top, left + crop, top + crop),
        )
        return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255


def run(config: BenchmarkConfig) -> list[Result]:
    """Compare readers of one folder.

    Args:
        config: Of the run.

    Returns:
        Rows in images per second.
    """
    count = 16 if config.quick else NUM_IMAGES
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, count)
        rows = [
            Variant(
                name="ours, whole folder into memory",
                build=partial(_verified, partial(ours_pictures.read_images, folder, SIDE), count),
                is_ours=True,
            ),
            *(
                Variant(
                    name=f"DALLE-pytorch's loader, {workers} workers",
                    build=partial(_verified, partial(read_as_peer, folder, workers), count),
                )
                for workers in (0, 2)
            ),
            Variant(
                name="Pillow alone: decoding, one thread, no resizing",
                build=partial(_verified, partial(decode_only, folder), count),
            ),
        ]
        return interleave(
            f"read and decode {count} JPEGs of 256 px to {SIDE} px",
            rows,
            unit="images/s",
            rounds=config.rounds,
        )


def read_as_peer(folder: Path, workers: int) -> int:
    """Read a folder once as DALLE-pytorch's training does; returns the number of images."""
    loader = DataLoader(DallePytorchFolder(folder), batch_size=16, num_workers=workers)
    return sum(len(batch) for batch in loader)


def decode_only(folder: Path) -> int:
    """Decode a folder's images and drop them; returns their number."""
    paths = list(folder.glob("*.jpg"))
    for path in paths:
        with Image.open(path) as image:
            image.load()
    return len(paths)


def _verified(read: Callable[[], int], count: int) -> Job:
    if (got := read()) != count:
        raise ValueError(f"{got} images were read, expected {count}")
    return Job(run=read, items=count)
