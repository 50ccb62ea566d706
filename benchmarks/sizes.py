"""The sizes at which programs are compared: the same tokens, width, depth and heads for all."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Size:
    """A decoder and its training batch."""

    name: str
    width: int
    layers: int
    heads: int
    text_length: int
    grid: int  # image tokens along a side
    vocab: int  # caption tokens
    codebook: int  # image tokens to choose from
    batch: int

    @property
    def image_length(self) -> int:
        """Image tokens per image."""
        return self.grid**2

    @property
    def length(self) -> int:
        """Positions per image."""
        return self.text_length + self.image_length

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.width // self.heads

    @property
    def intermediate(self) -> int:
        """Width of a gated feed-forward network: 8/3 of the width, rounded up to 64."""
        # Three matrices then hold as many weights as the two of a plain network four times as wide.
        return -(-8 * self.width // (3 * 64)) * 64

    @property
    def tokens(self) -> int:
        """Tokens of one training step."""
        return self.batch * self.length


#          name  width layers heads text grid vocab codebook batch
MEDIUM = Size("M", 512, 12, 8, 64, 16, 8192, 8192, 8)
SMALL = Size("S", 256, 6, 8, 32, 8, 2048, 1024, 32)
TOY = Size("toy", 64, 2, 2, 8, 4, 300, 128, 2)
DEMO = Size("demo", 256, 4, 4, 16, 8, 2048, 1000, 1)  # configs/demo
EMOJI_64 = Size("emoji-64", 320, 7, 5, 20, 16, 4096, 1000, 1)  # checkpoints/emoji-64


def random_pairs(size: Size, *, batch: int | None = None) -> tuple[Tensor, Tensor]:
    """Make the same captions (batch, text_length) and images (batch, image_length) every time."""
    generator = torch.Generator().manual_seed(0)
    rows = size.batch if batch is None else batch
    # From 1: a program that skips pads would have less to do.
    text = torch.randint(1, size.vocab, (rows, size.text_length), generator=generator)
    image = torch.randint(0, size.codebook, (rows, size.image_length), generator=generator)
    return text, image
