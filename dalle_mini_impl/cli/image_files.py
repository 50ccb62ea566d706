"""Images on disk: PNG files that remember how they were made, and a grid of them."""

import dataclasses
import json
import math
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dalle_mini_impl.data.image_grid import make_grid
from dalle_mini_impl.pipeline import TextToImagePipeline
from dalle_mini_impl.sampling.request import GenerationRequest, PipelineOutput

MAX_NAME_LENGTH = 60  # characters of the prompt
MAX_NAME_BYTES = 180  # of them, in UTF-8: 60 in Hangul; file systems allow 255 for a whole name


class ImageFile(NamedTuple):
    """An image that was written; sorted, they are in the order of prompts and seeds."""

    number: int
    """Of its prompt, among all that were generated into the folder."""
    seed: int
    path: str
    prompt: str


def model_name(model: str) -> str:
    """Name a model by its own folder; a run calls each of its models ``model``."""
    folder = Path(model).resolve()
    return folder.parent.name if folder.name == "model" else folder.name


def describe_generation(
    model: str, pipeline: TextToImagePipeline, request: GenerationRequest
) -> dict[str, Any]:
    """Collect, for the metadata of a file, all that decides an image but its prompt and seed."""
    return {
        "model": model_name(model),
        "vqvae": pipeline.vqvae.fingerprint(),
        "num_candidates": request.num_candidates,
        **dataclasses.asdict(request.sampling_config),
        **pipeline.native_metadata,
    }


def save_images(
    output: PipelineOutput, folder: Path, *, numbers: Mapping[str, int], metadata: dict[str, Any]
) -> list[ImageFile]:
    """Write each image under a name of its own, by the numbers of the prompts."""
    files = []
    for image, prompt, seed in zip(output.images, output.prompts, output.seeds, strict=True):
        path = folder / image_name(numbers[prompt], prompt, seed)
        save_image(image, path, prompt=prompt, seed=seed, metadata=metadata)
        files.append(ImageFile(numbers[prompt], seed, str(path), prompt))
    return files


def save_grid(path: Path, files: Sequence[ImageFile], *, num_images: int) -> None:
    """Lay written images out, a row for each prompt; single images fill a square."""
    images = []
    for file in files:
        with Image.open(file.path) as image:
            images.append(image.convert("RGB"))
    # A prompt's images stay on one row, unless there is one each.
    columns = num_images if num_images > 1 else math.ceil(math.sqrt(len(files)))
    make_grid(images, columns=columns, captions=[file.prompt for file in files]).save(path)


def image_name(number: int, prompt: str, seed: int) -> str:
    """Name an image's file, never a path: letters of every script and digits of the prompt stay."""
    # Composed letters: macOS and Linux would otherwise give one prompt two names.
    prompt = unicodedata.normalize("NFC", prompt).lower()
    words = re.sub(r"[\W_]+", "-", prompt).strip("-")[:MAX_NAME_LENGTH]
    # A letter that is cut in its bytes is dropped.
    words = words.encode()[:MAX_NAME_BYTES].decode(errors="ignore").strip("-")
    # A prompt of signs alone, such as one emoji, leaves no letters.
    return f"{number:04d}-{words or 'image'}_{seed}.png"


def grid_name(number: int) -> str:
    """Name the grid of a call by the number of its first prompt."""
    return f"grid-{number:04d}.png"


def next_number(folder: Path) -> int:
    """Find the first number that no image or grid of a folder has; 0 in an empty one."""
    names = [path.name for path in folder.iterdir()]
    # At most nine digits: a stranger's file must not push the numbers beyond any sense.
    found = [re.fullmatch(r"(?:grid-(\d{4,9})|(\d{4,9})-.*)\.png", name) for name in names]
    return max((int(match[1] or match[2]) + 1 for match in found if match), default=0)


def save_image(
    image: Image.Image, path: Path, *, prompt: str, seed: int, metadata: dict[str, Any]
) -> None:
    """Write a PNG with its prompt, seed and settings.

    The text chunk ``parameters`` is what common viewers show; ``dalle_mini_impl`` holds the same
    as JSON.
    """
    facts = {"prompt": prompt, "seed": seed, **metadata}
    # International text chunks hold any Unicode; plain ones only Latin-1.
    info = PngInfo()
    line = ", ".join(f"{key}: {value}" for key, value in facts.items() if key != "prompt")
    info.add_itxt("parameters", f"{prompt}\n{line}")
    info.add_itxt("dalle_mini_impl", json.dumps(facts, ensure_ascii=False))
    # Renamed when it is whole: a killed program leaves no half of an image under its name.
    unfinished = path.with_name(f".{path.name}")
    try:
        image.save(unfinished, format="png", pnginfo=info)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
