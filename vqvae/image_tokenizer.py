"""What the rest of the project needs of an image tokenizer, whoever made it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@runtime_checkable
class HasImageSize(Protocol):
    """A tokenizer's config."""

    @property
    def image_size(self) -> int:
        """Height and width of an image, in pixels."""


@runtime_checkable
class ImageTokenizer(Protocol):
    """Images to a grid of tokens and back: ``VQVAE``, and what ``vqvae.pretrained.load`` loads."""

    @property
    def config(self) -> HasImageSize:
        """Sizes."""

    @property
    def codebook_size(self) -> int:
        """Number of different tokens."""

    @property
    def codebook_levels(self) -> tuple[int, ...]:
        """Digits of a token, the least significant first; their product is the codebook size."""

    @property
    def image_grid_size(self) -> tuple[int, int]:
        """Tokens along (height, width)."""

    def encode_to_token_ids(
        self, pixels: Float[Tensor, "batch 3 image_height image_width"]
    ) -> Int[Tensor, "batch height width"]:
        """Turn images in [-1, 1] into their tokens; ``ValueError`` at another size."""

    def decode_from_token_ids(
        self, token_ids: Int[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch 3 image_height image_width"]:
        """Turn tokens into pixels clamped to [-1, 1]; ``ValueError`` outside the codebook."""

    def fingerprint(self) -> str:
        """Hash config and weights: equal fingerprints mean equal tokens for equal images."""

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write ``config.json`` and ``model.safetensors``, all that ``load_tokenizer`` needs."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its weights, as those of every module."""

    def to(self, device: Any, /) -> Any:
        """Move it, as every module."""

    def eval(self) -> Any:
        """Use it, not train it, as every module."""


def require_pixels(pixels: Tensor, image_size: int) -> None:
    """Refuse images of another size.

    Args:
        pixels: (batch, 3, height, width).
        image_size: Expected height and width.

    Raises:
        ValueError: If they have another one.
    """
    if pixels.shape[-2:] != (image_size, image_size):
        got = tuple(pixels.shape[-2:])
        raise ValueError(f"pixels: got {got}, expected {image_size} x {image_size}")


def require_token_ids(token_ids: Int[Tensor, "..."], codebook_size: int) -> None:
    """Refuse ids that no code has.

    Args:
        token_ids: Of any shape, none of them included.
        codebook_size: Number of codes.

    Raises:
        ValueError: If an id is outside the codebook.
    """
    if token_ids.numel() and not 0 <= token_ids.min() <= token_ids.max() < codebook_size:
        raise ValueError(
            f"token_ids: got {int(token_ids.min())} to {int(token_ids.max())}, "
            f"expected 0 to {codebook_size - 1}"
        )


def require_working(tokenizer: ImageTokenizer) -> None:
    """Send one gray image through a tokenizer: sizes that load may still contradict each other.

    Args:
        tokenizer: On any device.

    Raises:
        ValueError: If the image does not come back.
    """
    size = tokenizer.config.image_size
    device = next(tokenizer.parameters()).device
    try:
        token_ids = tokenizer.encode_to_token_ids(torch.zeros(1, 3, size, size, device=device))
        tokenizer.decode_from_token_ids(token_ids)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"this tokenizer loads but takes no image: {reason}") from None
