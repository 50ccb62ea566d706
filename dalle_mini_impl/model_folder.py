"""The folder of a trained model: index, hashes, card; written whole, read strictly."""

import hashlib
import json
from pathlib import Path
from typing import Any

from dalle_mini_impl.errors import UserError
from dalle_mini_impl.models.dalle_config import DalleConfig
from dalle_mini_impl.models.text_to_image import TextToImageModel, build_text_to_image
from vqvae.serialization import (
    build_checked,
    build_config,
    load_weights,
    own_file,
    read_json,
    shown,
)

INDEX_NAME = "model_index.json"
INDEX_FIELDS = ("format_version", "pipeline", "sampling", "sha256", "vqvae_fingerprint")
FORMAT_VERSION = 2
HASHED_FILES = ("dalle/model.safetensors", "text_tokenizer/tokenizer.json")
OTHER_FILES = ("dalle/config.json", "text_tokenizer/tokenizer_config.json", "vqvae/config.json",
               "vqvae/model.safetensors")  # fmt: skip
MODEL_CARD = """\
---
library_name: dalle_mini_impl
pipeline_tag: text-to-image
---
# A text-to-image model

Generates images of {size} x {size} pixels. A discrete VAE (`vqvae/`) makes an image of
{rows} x {columns} tokens out of {codes} codes; a causal Transformer (`dalle/`, {millions:.1f} M
parameters) writes them after a caption of up to {length} tokens (`text_tokenizer/`, {vocab}
different ones).

    from dalle_mini_impl.pipeline import TextToImagePipeline

    pipeline = TextToImagePipeline.from_pretrained("path/of/this/folder")
    pipeline("a prompt like the captions it learned", num_images=4, seed=0).images[0].show()

It knows what its training images showed, and their licenses and biases are its own: name them
here before you share the model.
"""


def file_hashes(folder: str | Path) -> dict[str, str]:
    """Hash the files of a model folder whose damage would not show.

    Args:
        folder: A model folder.

    Returns:
        What ``sha256`` in its ``model_index.json`` holds: digests by file.
    """
    digests = {name: hashlib.sha256() for name in HASHED_FILES}
    for name, digest in digests.items():
        with (Path(folder) / name).open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _read_index(folder: Path) -> dict[str, Any]:
    index = read_json(own_file(folder, INDEX_NAME))
    version = index.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"format_version: got {shown(version)}, expected {FORMAT_VERSION}, "
            "with the field sha256; train_dalle.py --resume latest writes the folder anew"
        )
    any_order = index.get("generates_any_order", False)  # older folders do not say
    if not isinstance(any_order, bool):
        raise UserError(
            f"generates_any_order: got {shown(repr(any_order))}, expected true or false"
        )
    odd = sorted((index.keys() - {"generates_any_order"}) ^ set(INDEX_FIELDS))
    if odd:
        raise UserError(f"{INDEX_NAME}: unknown or missing fields: {shown(', '.join(odd))}")
    digests = index["sha256"]
    if not isinstance(digests, dict) or digests.keys() != set(HASHED_FILES):
        got = shown(repr(digests))
        raise UserError(f"sha256: got {got}, expected digests of {', '.join(HASHED_FILES)}")
    return index


def _load_dalle(folder: Path, digests: dict[str, Any]) -> TextToImageModel:
    config = build_config(DalleConfig, read_json(folder / "dalle" / "config.json"))
    path = folder / "dalle" / "model.safetensors"
    counts = {
        "decoder.num_layers": config.decoder.num_layers,
        "decoder.num_encoder_layers": config.decoder.num_encoder_layers,
        "codebook_levels": len(config.codebook_levels),
    }
    sizes = {
        "decoder.hidden_size": config.decoder.hidden_size,
        "vocab_size": config.vocab_size,
        "text_length": config.text_length,
        "image_grid_size": max(config.image_grid_size),
    }
    width, num_tokens = config.decoder.hidden_size, config.vocab_size + config.codebook_size
    num_cells = config.image_length if config.decoder.has_target_positions else 0
    # Before the hashes: a file of terabytes takes hours to read.
    dalle = build_checked(
        lambda: build_text_to_image(config),
        path,
        counts=counts,
        sizes=sizes,
        num_elements=config.decoder.num_layers * width**2
        + width * (num_tokens + config.text_length + num_cells),
    )
    for name, digest in file_hashes(folder).items():
        if digests[name] != digest:
            raise UserError(f"{name}: not what was written: its sha256 differs from {INDEX_NAME}")
    return load_weights(dalle, path)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
