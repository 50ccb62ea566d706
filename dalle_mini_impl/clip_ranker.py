"""Ranks images by how well they fit their prompts: our CLIP, or one of ``transformers``.

>>> ranker = load_clip_ranker("out/clip/emoji/model")
>>> pipeline("a red heart", num_candidates=32, rank=ranker).images[0].show()
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dalle_mini_impl.data.images import image_to_pixels, resize_and_crop, to_rgb
from dalle_mini_impl.data.pairs import is_hub_name
from dalle_mini_impl.data.text_tokenizer import TextTokenizer
from dalle_mini_impl.errors import UserError, one_line
from dalle_mini_impl.model_folder import CONFIG_NAME, TOKENIZER_FOLDER, WEIGHTS_NAME, save_model
from dalle_mini_impl.models.clip import Clip, ClipConfig
from vqvae import serialization

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
BATCH_SIZE = 32
EXPECTED = "expected a folder that train_clip.py wrote, or a CLIP of transformers with safetensors"


class ClipRanker:
    """Our CLIP and its caption tokenizer; results are on the CPU.

    Raises:
        UserError: If they do not fit each other.
    """

    def __init__(self, model: Clip, text_tokenizer: TextTokenizer) -> None:
        for name in ("vocab_size", "text_length"):
            got, expected = getattr(text_tokenizer, name), getattr(model.config, name)
            if got != expected:
                raise UserError(f"{name}: got {got} in the tokenizer, the model expects {expected}")
        self.model, self.text_tokenizer = model, text_tokenizer

    def to(self, device: torch.device | str) -> "ClipRanker":
        """Move the model."""
        self.model.to(device)
        return self

    def score(
        self, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> Float[Tensor, " batch"]:
        """Return the cosine of each image, of any size, with its prompt.

        Raises:
            UserError: If a prompt is empty.
        """
        unique = list(dict.fromkeys(prompts))
        texts = dict(zip(unique, self.embed_texts(unique), strict=True))
        pairs = zip(self.embed_images(images), prompts, strict=True)
        # Pair by pair: no score depends on the rest of the batch.
        return torch.stack([(image * texts[prompt]).sum() for image, prompt in pairs])

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image.Image]) -> Float[Tensor, "batch embedding"]:
        """Embed images of any size, scaled and cropped to the model's square, as unit vectors."""
        side = self.model.config.image_size
        images = [resize_and_crop(to_rgb(each), (side, side)) for each in images]
        return self.embed_pixels(torch.stack([image_to_pixels(each) for each in images]))

    @torch.inference_mode()
    def embed_pixels(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch embedding"]:
        """Embed pixels in [-1, 1], of the model's own size, as unit vectors."""
        return _in_equal_batches(self.model.embed_images, pixels.to(self._device)).cpu()

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "batch embedding"]:
        """Embed texts as unit vectors.

        Raises:
            UserError: If a text is empty.
        """
        text_token_ids = self.text_tokenizer.encode(texts).to(self._device)
        return _in_equal_batches(self.model.embed_texts, text_token_ids).cpu()

    @property
    def _device(self) -> torch.device:
        return self.model.log_scale.device

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model, its config and the tokenizer."""
        config = dataclasses.asdict(self.model.config)
        save_model(Path(folder), self.model, config, self.text_tokenizer)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ClipRanker":
        """Load what ``save_pretrained`` wrote, strictly; in evaluation mode, on the CPU.

        Raises:
            UserError: If the folder is none, or its parts are damaged or do not fit.
        """
        folder = Path(folder)
        try:
            config = serialization.build_config(
                ClipConfig, serialization.read_json(serialization.own_file(folder, CONFIG_NAME))
            )
            for name in TOKENIZER_FILES:
                serialization.own_file(folder, f"{TOKENIZER_FOLDER}/{name}")
            model = _load_model(config, serialization.own_file(folder, WEIGHTS_NAME))
            return cls(model, TextTokenizer.from_pretrained(folder / TOKENIZER_FOLDER))
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            raise UserError(
                f"clip: {folder} does not load: {one_line(error)}; {EXPECTED}"
            ) from None


def _load_model(config: ClipConfig, weights: Path) -> Clip:
    towers = config.towers
    image, text = towers.image, towers.text
    # Per block: four attention matrices, and two of the feed-forward.
    blocks = sum(
        each.num_layers * each.hidden_size * (4 * each.hidden_size + 2 * each.intermediate_size)
        for each in (image, text)
    )
    model = serialization.build_checked(
        lambda: Clip(config),
        weights,
        counts={
            "towers.image.num_layers": image.num_layers,
            "towers.text.num_layers": text.num_layers,
        },
        sizes={
            "towers.image.hidden_size": image.hidden_size,
            "towers.image.intermediate_size": image.intermediate_size,
            "towers.image.patch_size": image.patch_size,
            "towers.text.hidden_size": text.hidden_size,
            "towers.text.intermediate_size": text.intermediate_size,
            "towers.embedding_size": towers.embedding_size,
            "vocab_size": config.vocab_size,
            "text_length": config.text_length,
        },
        num_elements=blocks
        + text.hidden_size * (config.vocab_size + config.text_length)
        + image.hidden_size * (config.image_size // image.patch_size) ** 2,
    )
    return serialization.load_weights(model, weights)


def _in_equal_batches(embed: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    parts = []
    for part in rows.split(BATCH_SIZE):
        # Every batch has BATCH_SIZE rows: products of other shapes round in another way. The rest
        # of its batch then moves an embedding by rounding at most.
        padding = part.new_zeros(BATCH_SIZE - len(part), *part.shape[1:])
        parts.append(embed(torch.cat([part, padding]))[: len(part)])
    return torch.cat(parts)


class TransformersClipRanker:
    """A pretrained CLIP of the library ``transformers``: a ``CLIPModel`` and its processor."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model.eval(), processor

    def to(self, device: torch.device | str) -> "TransformersClipRanker":
        """Move the model."""
        self.model.to(device)
        return self

    @torch.inference_mode()
    def score(
        self, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> Float[Tensor, " batch"]:
        """Return the cosine of each image with its prompt, which is cut to the model's length."""
        scores = []
        for image, prompt in zip(images, prompts, strict=True):  # no score depends on another
            # Truncated: theirs read 77 tokens at most, and a prompt may be longer.
            inputs = self.processor(
                text=[prompt], images=[to_rgb(image)], return_tensors="pt", truncation=True
            )
            outputs = self.model(**inputs.to(self.model.device))
            scores.append(F.cosine_similarity(outputs.image_embeds, outputs.text_embeds)[0])
        return torch.stack(scores).float().cpu()

    @classmethod
    def from_pretrained(cls, name: str) -> "TransformersClipRanker":
        """Load a CLIP from a folder, or from the Hugging Face Hub; on the CPU.

        Nothing is unpickled, and no code of the Hub runs.

        Raises:
            UserError: If there is no such model, or it does not load.
        """
        from transformers import CLIPModel, CLIPProcessor

        is_local = Path(name).exists()
        noisy = logging.getLogger("transformers")
        level = noisy.level
        # It prints a table of missing weights, which we refuse in one line.
        noisy.setLevel(logging.ERROR)
        try:
            loaded: Any = CLIPModel.from_pretrained(
                name,
                use_safetensors=True,
                local_files_only=is_local,
                output_loading_info=True,
            )
            model, info = loaded
            # transformers would put random weights in their place.
            missing = sorted(info["missing_keys"])
            if missing:
                raise ValueError(f"tensor {missing[0]}: missing")
            processor = CLIPProcessor.from_pretrained(name, local_files_only=is_local)
        except Exception as error:  # the library raises whatever its parts raise
            reason = one_line(error)[:300]
            raise UserError(f"clip: {name} does not load: {reason}; {EXPECTED}") from None
        finally:
            noisy.setLevel(level)
        return cls(model, processor)


def load_clip_ranker(name: str | Path) -> ClipRanker | TransformersClipRanker:
    """Load our CLIP from its folder, or one of ``transformers`` from its folder or the Hub.

    Raises:
        UserError: If it does not load.
    """
    folder = Path(name)
    # A mistyped folder must not be asked for on the network.
    if not folder.exists() and not is_hub_name(str(name)):
        raise UserError(f"clip: {name}: no such folder; {EXPECTED}")
    if (folder / TOKENIZER_FOLDER).is_dir() or (
        folder.is_dir() and not _is_of_transformers(folder)
    ):
        return ClipRanker.from_pretrained(folder)
    return TransformersClipRanker.from_pretrained(str(name))


def _is_of_transformers(folder: Path) -> bool:
    """Tell whether a folder holds a model of ``transformers``: its config names a model type."""
    try:
        return "model_type" in serialization.read_json(serialization.own_file(folder, CONFIG_NAME))
    except (ValueError, OSError):
        return False
