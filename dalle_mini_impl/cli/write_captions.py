"""Captions for images that have none, by a captioner of transformers: x.txt beside x.jpg."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle_mini_impl.cli.arguments import OneLineParser, require_at_least, user_path, user_text
from dalle_mini_impl.cli.main import COMMANDS
from dalle_mini_impl.errors import UserError, one_line

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(
        description=COMMANDS["write_captions"],
        epilog="Example: write_captions photos --captioner Salesforce/blip-image-captioning-base",
    )
    add = parser.add_argument
    add("source", type=user_path, help="folder of images, at any depth")
    add("--captioner", type=user_text, required=True, help="Hub name or folder, as BLIP or GIT")
    add("--prompt", help="text that each caption begins with, for captioners that take one")
    add("--max_tokens", type=int, default=40, help="of a caption; default: %(default)d")
    add("--batch_size", type=int, default=8, help="images at a time; default: %(default)d")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Write a caption beside each image that has none; never overwrite a file."""
    options = parse(arguments)
    require_at_least(1, max_tokens=options.max_tokens, batch_size=options.batch_size)
    from dalle_mini_impl.data.images import BadImageError, decode_image
    from dalle_mini_impl.data.pairs import ReadOptions, open_pairs
    from dalle_mini_impl.progress import counted, log_now_and_then

    if not options.source.is_dir():
        raise UserError(f"source: got {options.source}, expected a folder of images")
    try:
        pairs = open_pairs(str(options.source), options=ReadOptions(needs_captions=False))
    except UserError as error:
        raise UserError(f"source: {error}") from None
    files = [options.source / pair.path for pair in pairs if not pair.captions]
    texts = [file.with_suffix(".txt") for file in files]
    # An empty file is the user's own, too.
    waiting = [
        index for index, text in enumerate(texts) if files[index].is_file() and not text.exists()
    ]
    if not waiting:
        logger.info(f"{options.source}: each of {counted(len(pairs), 'image')} has a caption")
        return
    captioner = Captioner(options.captioner, prompt=options.prompt, max_tokens=options.max_tokens)
    progress, num_written = log_now_and_then("captions"), 0
    for start in range(0, len(waiting), options.batch_size):
        images, places = [], []
        for index in waiting[start : start + options.batch_size]:
            try:
                images.append(decode_image(files[index].read_bytes(), source=str(files[index])))
                places.append(texts[index])
            except (BadImageError, OSError) as error:
                logger.info(f"skipped {error}")
        for place, caption in zip(places, captioner(images) if images else [], strict=True):
            num_written += write_new(place, caption)
        progress(min(start + options.batch_size, len(waiting)), len(waiting))
    logger.info(f"{options.source}: {counted(num_written, 'caption')} written; read some of them")


class Captioner:
    """A model of transformers that puts images into words.

    Raises:
        UserError: If it does not load.
    """

    def __init__(self, name: str, *, prompt: str | None, max_tokens: int) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from dalle_mini_impl.hardware import find_device

        self.device, self.prompt, self.max_tokens = find_device(), prompt, max_tokens
        try:
            self.processor: Any = AutoProcessor.from_pretrained(name)
            # Tensors alone: pickled weights may run code.
            model = AutoModelForImageTextToText.from_pretrained(name, use_safetensors=True)
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise UserError(
                f"captioner: {name}: {one_line(error)[:300]}; expected the name or the folder of a "
                "captioner of transformers with safetensors, such as "
                "Salesforce/blip-image-captioning-base"
            ) from None
        self.model: Any = model.eval().to(self.device)

    def __call__(self, images: "Sequence[Image.Image]") -> list[str]:
        """Return one caption per image."""
        import torch

        given: dict[str, Any] = {"images": list(images), "return_tensors": "pt"}
        if self.prompt:
            given["text"] = [self.prompt] * len(images)
        with torch.inference_mode():
            inputs = self.processor(**given).to(self.device)
            token_ids = self.model.generate(**inputs, max_new_tokens=self.max_tokens)
        found = self.processor.batch_decode(token_ids, skip_special_tokens=True)
        return [" ".join(text.split()) for text in found]


def write_new(path: Path, caption: str) -> bool:
    """Write a caption, unless it is empty or the file is there by now."""
    if not caption:
        logger.info(f"no caption for {path.stem}: the captioner said nothing")
        return False
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(caption + "\n")
    except FileExistsError:
        return False
    except OSError as error:
        raise UserError(f"source: cannot write {path}: {error.strerror}") from None
    return True
