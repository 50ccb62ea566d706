"""The interface that every image tokenizer implements."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vqvae.serialization import shown


@runtime_checkable
class HasPixelSize(Protocol):
    """A tokenizer's config."""

    @property
    def pixel_size(self) -> tuple[int, int]:
        """Pixels along (height, width)."""


@runtime_checkable
class ImageTokenizer(Protocol):
    """Images to a grid of tokens and back: ``VQVAE``, and what ``vqvae.pretrained.load`` loads."""

    @property
    def config(self) -> HasPixelSize:
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
        """Return the int64 tokens of images in [-1, 1]; ``ValueError`` at another image size."""

    def decode_from_token_ids(
        self, token_ids: Int[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch 3 image_height image_width"]:
        """Return pixels clamped to [-1, 1]; ``ValueError`` for ids outside the codebook."""

    def fingerprint(self) -> str:
        """Hash config and weights: 16 hexadecimal digits, equal for equal tokens and pixels."""

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write a folder for ``load_tokenizer``; weights of ``dtype`` are read back as float32."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """As of every module."""

    def to(self, device: Any, /) -> Any:
        """As of every module."""

    def eval(self) -> Any:
        """As of every module."""


def require_pixels(pixels: Float[Tensor, "..."], pixel_size: tuple[int, int]) -> None:
    """Refuse images of another (height, width) with ``ValueError``."""
    if pixels.shape[-2:] != pixel_size:
        got, (height, width) = tuple(pixels.shape[-2:]), pixel_size
        raise ValueError(f"pixels: got {got}, expected {height} x {width}")


def require_token_ids(token_ids: Int[Tensor, "..."], codebook_size: int) -> None:
    """Refuse ids outside the codebook with ``ValueError``; no ids at all are fine."""
    if token_ids.numel() and not 0 <= token_ids.min() <= token_ids.max() < codebook_size:
        raise ValueError(
            f"token_ids: got {int(token_ids.min())} to {int(token_ids.max())}, "
            f"expected 0 to {codebook_size - 1}"
        )


def require_working(tokenizer: ImageTokenizer) -> None:
    """Send one gray image through a tokenizer; ``ValueError`` if it does not come back."""
    size = tokenizer.config.pixel_size
    device = next(tokenizer.parameters()).device
    # Weights of a library may load although its sizes contradict each other.
    try:
        token_ids = tokenizer.encode_to_token_ids(torch.zeros(1, 3, *size, device=device))
        tokenizer.decode_from_token_ids(token_ids)
    except RuntimeError as error:
        raise ValueError(f"this tokenizer loads but takes no image: {shown(error, 200)}") from None
