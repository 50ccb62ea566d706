"""Ranks pictures by how well they fit their prompts: our CLIP, or one of ``transformers``.

>>> ranker = load_clip_ranker("out/clip/emoji/model")
>>> pipeline("a red heart", num_candidates=32, rank=ranker).images[0].show()
"""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dalle_mini_impl.data.captions import CaptionEncoder
from dalle_mini_impl.data.images import image_to_pixels, resize_and_crop, to_rgb
from dalle_mini_impl.data.pairs import is_hub_name
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.models.clip import Clip, ClipConfig
from vqvae.json_files import build_config, own_file, read_json
from vqvae.weights import build_checked, load_weights, save_weights

CONFIG_NAME, WEIGHTS_NAME, TOKENIZER_NAME = "config.json", "model.safetensors", "text_tokenizer"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
BATCH_SIZE = 32
WANTED = "wanted a folder that train_clip.py wrote, or a CLIP of transformers with safetensors"


class ClipRanker:
    """Our CLIP and its caption tokenizer."""

    def __init__(self, model: Clip, captions: CaptionEncoder) -> None:
        """Put the parts together.

        Args:
            model: Compares pictures with captions.
            captions: The tokenizer that it was trained with.

        Raises:
            UserError: If they do not fit each other.
        """
        for name in ("vocab_size", "text_length"):
            got, wanted = getattr(captions, name), getattr(model.config, name)
            if got != wanted:
                raise UserError(f"{name}: got {got} in the tokenizer, the model wants {wanted}")
        self.model, self.captions = model, captions

    def to(self, device: torch.device | str) -> "ClipRanker":
        """Move the model.

        Args:
            device: For example ``cpu`` or ``cuda``.

        Returns:
            The ranker itself.
        """
        self.model.to(device)
        return self

    def score(
        self, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> Float[Tensor, " batch"]:
        """Compare each picture with its prompt.

        Args:
            images: Of any size; scaled and cropped to the model's square.
            prompts: One per picture.

        Returns:
            Cosines, on the CPU. A score does not depend on what is scored beside it.

        Raises:
            UserError: If a prompt is empty.
        """
        unique = list(dict.fromkeys(prompts))
        texts = dict(zip(unique, self.embed_texts(unique), strict=True))
        pairs = zip(self.embed_images(images), prompts, strict=True)
        return torch.stack([(image * texts[prompt]).sum() for image, prompt in pairs])

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image.Image]) -> Float[Tensor, "batch embedding"]:
        """Place pictures on the unit sphere.

        Args:
            images: Of any size.

        Returns:
            One row each, on the CPU.
        """
        size = self.model.config.image_size
        return self.embed_pixels(
            torch.stack([image_to_pixels(resize_and_crop(to_rgb(each), size)) for each in images])
        )

    @torch.inference_mode()
    def embed_pixels(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch embedding"]:
        """Place pictures of the model's own size on the unit sphere.

        Args:
            pixels: In [-1, 1].

        Returns:
            One row each, on the CPU.
        """
        return _in_equal_parts(self.model.embed_images, pixels.to(self._device)).cpu()

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "batch embedding"]:
        """Place texts on the unit sphere.

        Args:
            texts: None of them empty.

        Returns:
            One row each, on the CPU.

        Raises:
            UserError: If a text is empty.
        """
        text_token_ids = self.captions.encode(texts).to(self._device)
        return _in_equal_parts(self.model.embed_texts, text_token_ids).cpu()

    @property
    def _device(self) -> torch.device:
        return self.model.log_scale.device

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model, its config and the tokenizer.

        Args:
            folder: Made if missing.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(self.model, folder / WEIGHTS_NAME, dtype=torch.float32)
        self.captions.save_pretrained(folder / TOKENIZER_NAME)
        text = json.dumps(dataclasses.asdict(self.model.config), indent=2)
        (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ClipRanker":
        """Load what ``save_pretrained`` wrote, strictly.

        Args:
            folder: A folder that train_clip.py wrote.

        Returns:
            The ranker with its model in evaluation mode, on the CPU.

        Raises:
            UserError: If the folder is none, or its parts are damaged or do not fit.
        """
        folder = Path(folder)
        try:
            config = build_config(ClipConfig, read_json(own_file(folder, CONFIG_NAME)))
            for name in TOKENIZER_FILES:
                own_file(folder, f"{TOKENIZER_NAME}/{name}")
            model = _load_model(config, own_file(folder, WEIGHTS_NAME))
            return cls(model, CaptionEncoder.from_pretrained(folder / TOKENIZER_NAME))
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"clip: {folder} does not load: {reason}; {WANTED}") from None


def _load_model(config: ClipConfig, weights: Path) -> Clip:
    towers = config.towers
    image, text = towers.image, towers.text
    blocks = sum(
        each.num_layers * each.hidden_size * (4 * each.hidden_size + 2 * each.intermediate_size)
        for each in (image, text)
    )
    model = build_checked(
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
    return load_weights(model, weights)


def _in_equal_parts(embed: Any, rows: Tensor) -> Tensor:
    """Embed always as many rows: neighbours move one by rounding at most, mostly not at all."""
    parts = []
    for part in rows.split(BATCH_SIZE):
        padding = part.new_zeros(BATCH_SIZE - len(part), *part.shape[1:])
        parts.append(embed(torch.cat([part, padding]))[: len(part)])
    return torch.cat(parts)


class TransformersClipRanker:
    """A pretrained CLIP of the library ``transformers``."""

    def __init__(self, model: Any, processor: Any) -> None:
        """Put the parts together.

        Args:
            model: A ``CLIPModel``.
            processor: Its ``CLIPProcessor``.
        """
        self.model, self.processor = model.eval(), processor

    def to(self, device: torch.device | str) -> "TransformersClipRanker":
        """Move the model.

        Args:
            device: For example ``cpu`` or ``cuda``.

        Returns:
            The ranker itself.
        """
        self.model.to(device)
        return self

    @torch.inference_mode()
    def score(
        self, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> Float[Tensor, " batch"]:
        """Compare each picture with its prompt.

        Args:
            images: Of any size.
            prompts: One per picture; what is longer than the model reads is cut.

        Returns:
            Cosines, on the CPU.
        """
        scores = []
        for image, prompt in zip(images, prompts, strict=True):  # no score depends on another
            inputs = self.processor(
                text=[prompt], images=[to_rgb(image)], return_tensors="pt", truncation=True
            )
            outputs = self.model(**inputs.to(self.model.device))
            scores.append(F.cosine_similarity(outputs.image_embeds, outputs.text_embeds)[0])
        return torch.stack(scores).float().cpu()

    @classmethod
    def from_pretrained(cls, name: str) -> "TransformersClipRanker":
        """Load a CLIP from a folder, or from the Hugging Face Hub.

        Nothing that was pickled is loaded, and no code of the Hub runs.

        Args:
            name: A folder, or a name such as ``openai/clip-vit-base-patch32``.

        Returns:
            The ranker, on the CPU.

        Raises:
            UserError: If there is no such model, or it does not load.
        """
        from transformers import CLIPModel, CLIPProcessor

        is_local = Path(name).exists()
        noisy = logging.getLogger("transformers")
        level = noisy.level
        noisy.setLevel(logging.ERROR)  # a table of lost weights; we refuse them in one line
        try:
            loaded: Any = CLIPModel.from_pretrained(
                name,
                use_safetensors=True,
                local_files_only=is_local,
                output_loading_info=True,
            )
            model, info = loaded
            lost = sorted(info["missing_keys"])
            if lost:
                raise ValueError(f"tensor {lost[0]}: missing")
            processor = CLIPProcessor.from_pretrained(name, local_files_only=is_local)
        except Exception as error:  # the library raises whatever its parts raise
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(f"clip: {name} does not load: {reason}; {WANTED}") from None
        finally:
            noisy.setLevel(level)
        return cls(model, processor)


def load_clip_ranker(name: str | Path) -> ClipRanker | TransformersClipRanker:
    """Load our CLIP from its folder, or one of ``transformers`` from its folder or the Hub.

    Args:
        name: Folder, or name on the Hub.

    Returns:
        The ranker, on the CPU.

    Raises:
        UserError: If it does not load.
    """
    folder = Path(name)
    if not folder.exists() and not is_hub_name(str(name)):
        raise UserError(f"clip: {name}: no such folder; {WANTED}")
    if (folder / TOKENIZER_NAME).is_dir() or (folder.is_dir() and not is_of_transformers(folder)):
        return ClipRanker.from_pretrained(folder)
    return TransformersClipRanker.from_pretrained(str(name))


def is_of_transformers(folder: Path) -> bool:
    """Tell whether a folder holds a model of ``transformers``.

    Args:
        folder: Any.

    Returns:
        True if its config names the kind of model, which ours does not.
    """
    try:
        return "model_type" in read_json(own_file(folder, CONFIG_NAME))
    except (ValueError, OSError):
        return False
