"""The sizes at which programs are compared: the same tokens, width, depth and heads for all."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Size:
    """A decoder and its batch."""

    name: str
    width: int
    layers: int
    heads: int
    text_length: int
    grid: int
    """Image tokens along a side."""
    vocab: int
    """Caption tokens."""
    codebook: int
    """Image tokens to choose from."""
    batch: int
    """Images per training step."""

    @property
    def image_length(self) -> int:
        """Image tokens per image."""
        return self.grid**2

    @property
    def length(self) -> int:
        """Positions that go through the network per image."""
        return self.text_length + self.image_length

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.width // self.heads

    @property
    def intermediate(self) -> int:
        """Width of a gated feed-forward network: 8/3 of the width, rounded up to 64."""
        return -(-8 * self.width // (3 * 64)) * 64

    @property
    def tokens(self) -> int:
        """Tokens of one training step."""
        return self.batch * self.length


MEDIUM = Size(
    name="M", width=512, layers=12, heads=8, text_length=64, grid=16, vocab=8192,
    codebook=8192, batch=8,
)  # fmt: skip
SMALL = Size(
    name="S", width=256, layers=6, heads=8, text_length=32, grid=8, vocab=2048,
    codebook=1024, batch=32,
)  # fmt: skip
TOY = Size(
    name="toy", width=64, layers=2, heads=2, text_length=8, grid=4, vocab=300,
    codebook=128, batch=2,
)  # fmt: skip


def random_pairs(size: Size, *, batch: int | None = None) -> tuple[Tensor, Tensor]:
    """Make up captions without pads and images, the same ones every time.

    Args:
        size: Lengths and vocabularies.
        batch: Number of pairs; the training batch when None.

    Returns:
        Caption tokens (batch, text_length) from 1, and image tokens (batch, image_length) from 0.
    """
    generator = torch.Generator().manual_seed(0)
    rows = size.batch if batch is None else batch
    text = torch.randint(1, size.vocab, (rows, size.text_length), generator=generator)
    image = torch.randint(0, size.codebook, (rows, size.image_length), generator=generator)
    return text, image
