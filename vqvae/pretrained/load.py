"""Image tokenizers of every kind, behind the interface of our own.

``load_tokenizer`` reads a folder of ours, of ``JanusVQVAE`` or ``Emu3VQVAE`` of transformers, of
``VQModel`` of diffusers, of LlamaGen's tokenizer, or the two files of DALL-E's own. Only JSON and
safetensors are read, and no code comes from a folder. ``convert.py`` converts pickles, ``hub.py``
downloads.
"""

import dataclasses
from math import prod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vqvae.config import ImageSize, height_and_width
from vqvae.image_tokenizer import ImageTokenizer, require_pixels, require_token_ids
from vqvae.model import VQVAE
from vqvae.pretrained.adapters import KINDS, Sizes, kind_of, read_sizes
from vqvae.pretrained.llamagen import convert_llamagen, is_llamagen
from vqvae.pretrained.openai_dvae import ENCODER_NAME, load_openai_dvae
from vqvae.serialization import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    build_checked,
    build_config,
    hash_weights,
    load_weights,
    located,
    own_file,
    read_json,
    read_weights,
    save_tokenizer,
    shown,
    tensor_names,
    typed,
    without_version,
)

MAX_PIXELS_AT_ONCE = 2**20  # of a batch: networks of hundreds of channels at full size are large
PICKLES = (".pt", ".pth", ".ckpt")


def load_tokenizer(folder: str | Path, *, image_size: ImageSize | None = None) -> ImageTokenizer:
    """Load an image tokenizer, ours or another library's, strictly, in evaluation mode.

    Args:
        folder: Of ``save_pretrained`` of ``VQVAE``, of this module's tokenizer, of transformers'
            ``JanusVQVAE`` or ``Emu3VQVAE``, or of diffusers' ``VQModel``; or a folder with
            ``model.safetensors`` of LlamaGen's tokenizer, or ``encoder.safetensors`` and
            ``decoder.safetensors`` of DALL-E's.
        image_size: Side of square images in pixels, or (height, width), for tokenizers that take
            several.

    Raises:
        ValueError: If files are missing, damaged or of something else, or the size is missing or
            wrong.
    """
    folder = Path(folder)
    # A config decides: the two files of DALL-E come without one.
    has_config = (folder / CONFIG_NAME).is_file()
    if not has_config and (folder / ENCODER_NAME).is_file():
        return load_openai_dvae(folder, image_size=_required(image_size, "DALL-E's tokenizer"))
    if not has_config:
        _refuse_pickles(folder)
    path = folder / CONFIG_NAME
    values = read_json(own_file(folder, CONFIG_NAME)) if has_config else {}
    kind = kind_of(values)
    # LlamaGen's config, if there is one, lists a few sizes and no name.
    if kind is None and "format_version" not in values and _holds_llamagen(folder):
        size = _required(image_size, "LlamaGen's tokenizer")
        return _load_llamagen(own_file(folder, WEIGHTS_NAME), size)
    # Neither a library's marker nor our stored kind: a VQVAE of ours.
    if kind is None and "kind" not in values:
        return _of_that_size(VQVAE.from_pretrained(folder), image_size)
    with located(path):
        if kind is None:
            config = _stored_config(without_version(values))
            name = WEIGHTS_NAME
        else:
            sizes, usual_size = read_sizes(kind, values)
            size = _required(image_size or usual_size, kind)
            config = PretrainedConfig(kind=kind, image_size=size, sizes=sizes)
            name = sizes.weights_name
    return _of_that_size(_load(config, own_file(folder, name)), image_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainedConfig:
    """The config of another library's tokenizer."""

    kind: str
    """A key of ``KINDS``."""
    image_size: ImageSize
    """Side of a square image in pixels, or [height, width]."""
    sizes: Sizes
    """Sizes of the library's model."""

    def __post_init__(self) -> None:
        factor = self.sizes.downsampling
        if any(side < factor or side % factor for side in self.pixel_size):
            raise ValueError(f"image_size: got {self.image_size}, expected a multiple of {factor}")

    @property
    def pixel_size(self) -> tuple[int, int]:
        """Pixels along (height, width)."""
        return height_and_width(self.image_size)

    @property
    def image_grid_size(self) -> tuple[int, int]:
        """Tokens along (height, width)."""
        height, width = self.pixel_size
        return height // self.sizes.downsampling, width // self.sizes.downsampling


class PretrainedTokenizer(nn.Module):
    """A library's model as an ``ImageTokenizer``; ``config.sizes`` builds and calls it."""

    def __init__(self, config: PretrainedConfig, model: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.model = model

    @torch.no_grad()
    def encode_to_token_ids(
        self, pixels: Float[Tensor, "batch 3 image_height image_width"]
    ) -> Int[Tensor, "batch height width"]:
        """Images to tokens."""
        require_pixels(pixels, self.config.pixel_size)
        sizes = self.config.sizes
        return torch.cat([sizes.encode(self.model, part) for part in self._parts(pixels)])

    @torch.no_grad()
    def decode_from_token_ids(
        self, token_ids: Int[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch 3 image_height image_width"]:
        """Tokens to images; ``ValueError`` also at another grid: some models cannot tell."""
        if token_ids.shape[1:] != self.image_grid_size:
            raise ValueError(
                f"token_ids: got a grid of {tuple(token_ids.shape[1:])}, "
                f"expected {self.image_grid_size}"
            )
        # Embedding lookups on a GPU abort the process at an id out of range.
        require_token_ids(token_ids, self.codebook_size)
        # Not every model decodes an empty batch.
        if not len(token_ids):
            return torch.zeros(0, 3, *self.config.pixel_size, device=token_ids.device)
        sizes = self.config.sizes
        parts = [sizes.decode(self.model, part) for part in self._parts(token_ids)]
        # No decoder here ends in a bounded layer: saturated colors overshoot.
        return torch.cat(parts).clamp(-1, 1)

    @property
    def codebook_size(self) -> int:
        """Number of different tokens."""
        return self.config.sizes.codebook_size

    @property
    def codebook_levels(self) -> tuple[int, ...]:
        """The one digit of a token."""
        return (self.codebook_size,)

    @property
    def image_grid_size(self) -> tuple[int, int]:
        """Tokens along (height, width)."""
        return self.config.image_grid_size

    def fingerprint(self) -> str:
        """Hash config and weights."""
        return hash_weights(dataclasses.asdict(self.config), self.model.state_dict().items())

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write a folder for ``load_tokenizer``."""
        save_tokenizer(folder, self.model, dataclasses.asdict(self.config), dtype=dtype)

    def _parts(self, batch: Tensor) -> tuple[Tensor, ...]:
        # An image larger than the limit goes alone.
        return batch.split(max(1, MAX_PIXELS_AT_ONCE // prod(self.config.pixel_size)))


def _stored_config(values: dict[str, Any]) -> PretrainedConfig:
    """Read the config that ``PretrainedTokenizer.save_pretrained`` wrote."""
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind: got {shown(kind)}, expected one of {', '.join(KINDS)}")
    image_size = typed("image_size", values.get("image_size"), ImageSize)
    odd = sorted(values.keys() - {"kind", "image_size", "sizes"})
    if odd:
        raise ValueError(f"unknown fields: {shown(', '.join(odd))}")
    sizes = build_config(KINDS[kind], values.get("sizes"))
    return PretrainedConfig(kind=kind, image_size=image_size, sizes=sizes)


def _load(config: PretrainedConfig, path: Path) -> PretrainedTokenizer:
    sizes = config.sizes
    model = build_checked(
        lambda: sizes.build(config.image_grid_size).float(),
        path,
        counts=sizes.min_counts,
        sizes=sizes.min_lengths,
        num_elements=sizes.codebook_size,
    )
    return PretrainedTokenizer(config, load_weights(model, path)).eval()


def _holds_llamagen(folder: Path) -> bool:
    path = folder / WEIGHTS_NAME
    return path.is_file() and is_llamagen(tensor_names(own_file(folder, WEIGHTS_NAME)))


def _load_llamagen(path: Path, image_size: ImageSize) -> PretrainedTokenizer:
    with located(path):
        sizes, weights = convert_llamagen(read_weights(path))
        config = PretrainedConfig(kind="janus", image_size=image_size, sizes=sizes)
        model = sizes.build(config.image_grid_size).float()
        model.load_state_dict(weights, strict=True)
    return PretrainedTokenizer(config, model).eval()


def _refuse_pickles(folder: Path) -> None:
    """Say how to convert what is published as a pickle; this module opens none."""
    files = [folder] if folder.is_file() else sorted(folder.glob("*"))
    pickles = [file for file in files if file.suffix in PICKLES]
    if pickles and not any(file.suffix == ".safetensors" for file in files):
        raise ValueError(
            f"{folder}: got {pickles[0].name}, a pickle, expected safetensors; convert it once: "
            f"python scripts/convert_tokenizer.py {pickles[0]} --out FOLDER"
        )


def _of_that_size(tokenizer: ImageTokenizer, image_size: ImageSize | None) -> ImageTokenizer:
    height, width = tokenizer.config.pixel_size
    if image_size is not None and height_and_width(image_size) != (height, width):
        raise ValueError(f"image_size: got {image_size}, this tokenizer's is {height} x {width}")
    return tokenizer


def _required(image_size: ImageSize | None, kind: str) -> ImageSize:
    if image_size is None:
        raise ValueError(
            f"image_size: got none, expected pixels a side: {kind} takes several sizes"
        )
    return image_size
