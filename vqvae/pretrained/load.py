"""Image tokenizers that others have trained, behind the same few methods as our own.

``load_tokenizer`` reads a folder of ours, one that ``JanusVQVAE`` or ``Emu3VQVAE`` of transformers
or ``VQModel`` of diffusers has written, or the two files of DALL-E's own tokenizer. Only JSON and
safetensors are read, and no code comes from a folder.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vqvae.image_tokenizer import ImageTokenizer, require_pixels, require_token_ids
from vqvae.model import CONFIG_NAME, FORMAT_VERSION, VQVAE, WEIGHTS_NAME
from vqvae.pretrained.adapters import KINDS, Sizes, kind_of, read_sizes
from vqvae.pretrained.openai_dvae import DECODER_NAME, ENCODER_NAME, load_openai_dvae
from vqvae.serialization import (
    build_checked,
    build_config,
    hash_weights,
    load_weights,
    own_file,
    read_json,
    save_weights,
    shown,
)

PIXELS_AT_ONCE = 2**20  # of a batch: networks of hundreds of channels at full size are large


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainedConfig:
    """What a tokenizer of another library is.

    Raises:
        ValueError: If the image does not divide into tokens.
    """

    kind: str
    """A key of ``KINDS``."""
    image_size: int
    """Height and width of an image, in pixels."""
    sizes: Sizes
    """Sizes of the library's model."""

    def __post_init__(self) -> None:
        """Refuse an image that does not divide into tokens."""
        side = self.sizes.downsampling
        if self.image_size < side or self.image_size % side:
            raise ValueError(f"image_size: got {self.image_size}, expected a multiple of {side}")


class PretrainedTokenizer(nn.Module):
    """A library's model, called as ``VQVAE`` is."""

    def __init__(self, config: PretrainedConfig, model: nn.Module) -> None:
        """Wrap a model.

        Args:
            config: Kind and sizes.
            model: The library's, as ``config.sizes`` builds it.
        """
        super().__init__()
        self.config = config
        self.model = model

    @torch.no_grad()
    def encode_to_token_ids(
        self, pixels: Float[Tensor, "batch 3 image_height image_width"]
    ) -> Int[Tensor, "batch height width"]:
        """Turn images into their tokens.

        Args:
            pixels: In [-1, 1]; height and width must equal ``config.image_size``.

        Returns:
            int64 ids in [0, codebook_size).

        Raises:
            ValueError: If the images have another size.
        """
        require_pixels(pixels, self.config.image_size)
        return torch.cat([
            self.config.sizes.encode(self.model, part) for part in self._parts(pixels)
        ])  # fmt: skip

    @torch.no_grad()
    def decode_from_token_ids(
        self, token_ids: Int[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch 3 image_height image_width"]:
        """Turn tokens into images.

        Args:
            token_ids: Ids in [0, codebook_size).

        Returns:
            Pixels clamped to [-1, 1].

        Raises:
            ValueError: If an id is outside the codebook, or the grid has another size.
        """
        if token_ids.shape[1:] != self.image_grid_size:
            raise ValueError(
                f"token_ids: got a grid of {tuple(token_ids.shape[1:])}, "
                f"expected {self.image_grid_size}"
            )
        require_token_ids(token_ids, self.codebook_size)
        if not len(token_ids):
            size = self.config.image_size
            return torch.zeros(0, 3, size, size, device=token_ids.device)
        return torch.cat([
            self.config.sizes.decode(self.model, part) for part in self._parts(token_ids)
        ]).clamp(-1, 1)  # fmt: skip

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
        side = self.config.image_size // self.config.sizes.downsampling
        return side, side

    def fingerprint(self) -> str:
        """Hash config and weights: equal fingerprints mean equal tokens for equal images.

        Returns:
            16 hexadecimal digits.
        """
        return hash_weights(dataclasses.asdict(self.config), self.model.state_dict().items())

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write ``config.json`` and ``model.safetensors`` into ``folder``.

        Args:
            folder: Made if missing.
            dtype: Of the stored weights; they are read back as float32.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(self.model, folder / WEIGHTS_NAME, dtype=dtype)
        config = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self.config)}
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _parts(self, batch: Tensor) -> tuple[Tensor, ...]:
        return batch.split(max(1, PIXELS_AT_ONCE // self.config.image_size**2))


def load_tokenizer(folder: str | Path, *, image_size: int | None = None) -> ImageTokenizer:
    """Load an image tokenizer, ours or another library's, strictly.

    Args:
        folder: What ``save_pretrained`` of ``VQVAE``, of this module's tokenizer, of transformers'
            ``JanusVQVAE`` or ``Emu3VQVAE``, or of diffusers' ``VQModel`` wrote; or
            ``encoder.safetensors`` and ``decoder.safetensors`` of DALL-E's own tokenizer.
        image_size: Side of the images in pixels, for tokenizers that take several.

    Returns:
        The tokenizer in evaluation mode.

    Raises:
        ValueError: If files are missing, damaged or of something else, or the size is missing or
            wrong.
    """
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file():
        if (folder / ENCODER_NAME).is_file() and (folder / DECODER_NAME).is_file():
            return load_openai_dvae(folder, image_size=_required(image_size, "DALL-E's tokenizer"))
        raise ValueError(f"image tokenizer {folder}: no {CONFIG_NAME} there")
    path = own_file(folder, CONFIG_NAME)
    values = read_json(path)
    kind = kind_of(values)
    if kind is None and "kind" not in values:
        return _of_that_size(VQVAE.from_pretrained(folder), image_size)
    try:
        if kind is None:
            config = _own_config(values)
            name = WEIGHTS_NAME
        else:
            sizes, usual_size = read_sizes(kind, values)
            expected = _required(image_size or usual_size, kind)
            config = PretrainedConfig(kind=kind, image_size=expected, sizes=sizes)
            name = sizes.weights_name
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not (folder / name).is_file():
        raise ValueError(f"image tokenizer {folder}: no {name} there")
    return _of_that_size(_load(config, own_file(folder, name)), image_size)


def _own_config(values: dict[str, Any]) -> PretrainedConfig:
    """Read what ``PretrainedTokenizer.save_pretrained`` wrote."""
    version, kind, image_size = (
        values.get(name) for name in ("format_version", "kind", "image_size")
    )
    if kind is None:
        raise ValueError("no image tokenizer's config: it has no kind")
    if version != FORMAT_VERSION:
        raise ValueError(f"format_version: got {shown(version)}, expected {FORMAT_VERSION}")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind: got {shown(kind)}, expected one of {', '.join(KINDS)}")
    if type(image_size) is not int:
        raise ValueError(f"image_size: got {shown(image_size)}, expected a whole number")
    odd = sorted(values.keys() - {"format_version", "kind", "image_size", "sizes"})
    if odd:
        raise ValueError(f"unknown fields: {shown(', '.join(odd))}")
    sizes = build_config(KINDS[kind], values.get("sizes"))
    return PretrainedConfig(kind=kind, image_size=image_size, sizes=sizes)


def _load(config: PretrainedConfig, path: Path) -> PretrainedTokenizer:
    sizes = config.sizes
    model = build_checked(
        lambda: sizes.build(config.image_size).float(),
        path,
        counts=sizes.counts,
        sizes=sizes.lengths,
        num_elements=sizes.codebook_size,
    )
    return PretrainedTokenizer(config, load_weights(model, path)).eval()


def _of_that_size(tokenizer: ImageTokenizer, image_size: int | None) -> ImageTokenizer:
    own_size = tokenizer.config.image_size
    if image_size not in (None, own_size):
        raise ValueError(f"image_size: got {image_size}, this tokenizer's is {own_size}")
    return tokenizer


def _required(image_size: int | None, what: str) -> int:
    if image_size is None:
        raise ValueError(
            f"image_size: got none, expected pixels a side: {what} takes several sizes"
        )
    return image_size
