"""The image folder of a procedural world: its images are functions of a split and a seed."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dalle_mini_impl.data.readers.metadata import METADATA_NAME, write_metadata
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.output_dirs import data_set_folder


def write_generated_folder(
    out: Path,
    make_image: Callable[[str, int], tuple[Image.Image, dict[str, Any]]],
    *,
    counts: Mapping[str, int],
    splits: Sequence[str],
    writer: str,
) -> int:
    """Write ``out``/images/<split>/<seed>.png and ``out``/metadata.jsonl; return how many images.

    metadata.jsonl comes last and at once: a folder without it is an interrupted run. Running again
    overwrites, but never a folder that something else wrote.

    Args:
        out: Folder to write.
        make_image: Split and seed -> image and its row of metadata, without file name and split.
        counts: Images of each split, whose seeds run from 0.
        splits: Those that the world has.
        writer: Name of the command, for the next run to know its own folder by.
    """
    if not set(counts) <= set(splits) or min(counts.values(), default=0) < 0:
        raise UserError(f"counts: got {dict(counts)!r}, expected counts >= 0 of {tuple(splits)}")
    with data_set_folder(out, field="out", writer=writer):
        (out / METADATA_NAME).unlink(missing_ok=True)
        rows = []
        for split, count in counts.items():
            folder = out / "images" / split
            folder.mkdir(parents=True, exist_ok=True)
            for stale in folder.glob("*.png"):
                stale.unlink()
            for seed in range(count):
                image, row = make_image(split, seed)
                path = folder / f"{seed:07d}.png"
                image.save(path)
                rows.append({"file_name": path.relative_to(out).as_posix(), **row, "split": split})
        write_metadata(out, rows)
    return len(rows)
