"""The folder of a trained model: index, hashes, card; written whole, read strictly.

model_index.json    sampling config, fingerprint of the image tokenizer, hashes; written last
README.md           the model card
vqvae/              the image tokenizer
dalle/              the decoder: config.json, model.safetensors
text_tokenizer/     the caption tokenizer
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from dalle_mini_impl.data.text_tokenizer import TextTokenizer
from dalle_mini_impl.errors import UserError, one_line
from dalle_mini_impl.models.dalle_config import DalleConfig
from dalle_mini_impl.models.text_to_image import TextToImageModel, build_text_to_image
from dalle_mini_impl.sampling.sampler import SamplingConfig
from vqvae import serialization
from vqvae.image_tokenizer import ImageTokenizer
from vqvae.pretrained.load import load_tokenizer

Pipeline = TypeVar("Pipeline")
INDEX_NAME, CONFIG_NAME, WEIGHTS_NAME = "model_index.json", "config.json", "model.safetensors"
TOKENIZER_FOLDER = "text_tokenizer"
FORMAT_VERSION = 2
INDEX_FIELDS = {
    "format_version",
    "pipeline",
    "sampling",
    "generates_any_order",
    "vqvae_fingerprint",
    "sha256",
}
HASHED_FILES = ("dalle/model.safetensors", "text_tokenizer/tokenizer.json")
OTHER_FILES = (
    "dalle/config.json",
    "text_tokenizer/tokenizer_config.json",
    "vqvae/config.json",
    "vqvae/model.safetensors",
)
MODEL_CARD = """\
---
library_name: dalle_mini_impl
pipeline_tag: text-to-image
---
# A text-to-image model

Generates images of {height} x {width} pixels. A discrete VAE (`vqvae/`) turns an image into
{rows} x {columns} tokens of a codebook of {codes}; a causal Transformer (`dalle/`, {millions:.1f} M
parameters) samples them after a caption of up to {length} tokens (`text_tokenizer/`, vocabulary of
{vocab}).

    from dalle_mini_impl.pipeline import TextToImagePipeline

    pipeline = TextToImagePipeline.from_pretrained("path/of/this/folder")
    pipeline("a prompt like its training captions", num_images=4, seed=0).images[0].show()

It knows what its training images showed. Name their licenses and biases here before you share the
model.
"""


def save_parts(
    folder: Path,
    *,
    dalle: TextToImageModel,
    vqvae: ImageTokenizer,
    text_tokenizer: TextTokenizer,
    sampling_config: SamplingConfig,
    generates_any_order: bool,
    dtype: torch.dtype,
) -> None:
    """Write the parts of a pipeline as a model folder, its weights as ``dtype``."""
    vqvae.save_pretrained(folder / "vqvae", dtype=dtype)
    config = dataclasses.asdict(dalle.config)
    save_model(folder, dalle, config, text_tokenizer, subfolder="dalle", dtype=dtype)
    index = {
        "format_version": FORMAT_VERSION,
        "pipeline": "TextToImagePipeline",
        "sampling": dataclasses.asdict(sampling_config),
        "generates_any_order": generates_any_order,
        # Of the stored weights, which are others than the model's when they are rounded.
        "vqvae_fingerprint": load_tokenizer(folder / "vqvae").fingerprint(),
        "sha256": file_hashes(folder),
    }
    (height, width), (rows, columns) = vqvae.config.pixel_size, vqvae.image_grid_size
    card = MODEL_CARD.format(
        height=height,
        width=width,
        rows=rows,
        columns=columns,
        codes=vqvae.codebook_size,
        millions=sum(weight.numel() for weight in dalle.parameters()) / 1e6,
        vocab=text_tokenizer.vocab_size,
        length=text_tokenizer.text_length,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    # Last: a folder without its index is not finished.
    write_json(folder / INDEX_NAME, index)


def load_parts(folder: Path, *, build: Callable[..., Pipeline]) -> Pipeline:
    """Build a pipeline from a model folder, strictly; in evaluation mode, on the CPU.

    Raises:
        UserError: If the folder is no model folder, or its parts are damaged or do not fit.
    """
    if not (folder / INDEX_NAME).is_file():
        expected = "the folder that train_dalle.py wrote, for example out/demo/dalle/model"
        if (folder / "model" / INDEX_NAME).is_file():  # the run's folder
            expected = f"{folder / 'model'}"
        raise UserError(
            f"model: {folder} is no model folder (no {INDEX_NAME} in it); expected {expected}"
        )
    try:
        index = _read_index(folder)
        # Links that lead out of the folder are refused before anything is read through them.
        for name in (*HASHED_FILES, *OTHER_FILES):
            serialization.own_file(folder, name)
        vqvae = load_tokenizer(folder / "vqvae")
        if vqvae.fingerprint() != index["vqvae_fingerprint"]:
            raise UserError("vqvae: not the image tokenizer that the decoder was trained on")
        return build(
            dalle=_load_dalle(folder, index["sha256"]),
            vqvae=vqvae,
            text_tokenizer=TextTokenizer.from_pretrained(folder / TOKENIZER_FOLDER),
            sampling_config=serialization.build_config(SamplingConfig, index["sampling"]),
            generates_any_order=index["generates_any_order"],
        )
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        raise UserError(f"model: {folder} does not load: {one_line(error)}") from error


def save_model(
    folder: Path,
    model: nn.Module,
    config: dict[str, Any],
    text_tokenizer: TextTokenizer,
    *,
    subfolder: str = "",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a model and its config into a folder, or below it, and its text tokenizer."""
    (folder / subfolder).mkdir(parents=True, exist_ok=True)
    serialization.save_weights(model, folder / subfolder / WEIGHTS_NAME, dtype=dtype)
    write_json(folder / subfolder / CONFIG_NAME, config)
    text_tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write an object as JSON in UTF-8."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def file_hashes(folder: str | Path) -> dict[str, str]:
    """Return the SHA-256 of the files whose damage would not show otherwise, by file."""
    digests = {name: hashlib.sha256() for name in HASHED_FILES}
    for name, digest in digests.items():
        with (Path(folder) / name).open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _read_index(folder: Path) -> dict[str, Any]:
    index = serialization.read_json(serialization.own_file(folder, INDEX_NAME))
    version = index.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"format_version: got {serialization.shown(version)}, expected {FORMAT_VERSION}"
        )
    odd = sorted(index.keys() ^ INDEX_FIELDS)
    if odd:
        raise UserError(
            f"{INDEX_NAME}: unknown or missing fields: {serialization.shown(', '.join(odd))}"
        )
    any_order, digests = index["generates_any_order"], index["sha256"]
    if not isinstance(any_order, bool):
        got = serialization.shown(repr(any_order))
        raise UserError(f"generates_any_order: got {got}, expected true or false")
    if not isinstance(digests, dict) or digests.keys() != set(HASHED_FILES):
        got = serialization.shown(repr(digests))
        raise UserError(f"sha256: got {got}, expected digests of {', '.join(HASHED_FILES)}")
    return index


def _load_dalle(folder: Path, digests: dict[str, Any]) -> TextToImageModel:
    config = serialization.build_config(
        DalleConfig, serialization.read_json(folder / "dalle" / CONFIG_NAME)
    )
    decoder, path = config.decoder, folder / "dalle" / WEIGHTS_NAME
    width, num_tokens = decoder.hidden_size, config.vocab_size + config.codebook_size
    num_cells = config.image_length if decoder.has_target_positions else 0
    # Against the file's header, and before the hashes: a file of terabytes takes hours to read.
    dalle = serialization.build_checked(
        lambda: build_text_to_image(config),
        path,
        counts={
            "decoder.num_layers": decoder.num_layers,
            "decoder.num_encoder_layers": decoder.num_encoder_layers,
            "codebook_levels": len(config.codebook_levels),
        },
        sizes={
            "decoder.hidden_size": width,
            "vocab_size": config.vocab_size,
            "text_length": config.text_length,
            "image_grid_size": max(config.image_grid_size),
        },
        num_elements=decoder.num_layers * width**2
        + width * (num_tokens + config.text_length + num_cells),
    )
    for name, digest in file_hashes(folder).items():
        if digests[name] != digest:
            raise UserError(f"{name}: not what was written: its sha256 differs from {INDEX_NAME}")
    return serialization.load_weights(dalle, path)
