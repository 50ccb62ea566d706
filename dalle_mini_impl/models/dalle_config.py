"""The config of a text-to-image decoder: two frozen dataclasses that check themselves.

The defaults are ours; the other choices are those of the papers that their fields name.
"""

from dataclasses import dataclass, fields
from math import prod
from typing import Literal, get_args

from dalle_mini_impl.transformer.block_config import (
    DEFAULT_OPTIONS,
    RADFORD_2019,
    BlockOptions,
    require_dropout_probability,
    require_positive,
)
from dalle_mini_impl.transformer.positions import ImagePositions

PAD_TOKEN_ID = 0  # of captions; a caption of pads alone is the null caption
MAX_MASKED_LENGTH = 8192  # positions; a mask of the whole sequence has their square
Architecture = Literal["decoder_only", "encoder_decoder"]
Attention = Literal["dense", "dalle"]
Block = Literal["swiglu", "gelu"]
# Options available with an encoder; the others keep their defaults.
ENCODER_DECODER_FIELDS = {
    "hidden_size",
    "num_layers",
    "num_heads",
    "dropout_probability",
    "architecture",
    "num_encoder_layers",
}


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The part of a decoder that a user chooses; the rest follows from the data."""

    hidden_size: int = 256
    """Width of the residual stream."""
    num_layers: int = 6
    """Transformer blocks."""
    num_heads: int = 4
    """Attention heads per block."""
    dropout_probability: float = 0.1
    """Fraction of each branch's channels dropped in training."""
    positions: ImagePositions = "rotary"
    """Image positions: rotary on the grid, a learned table, the table of 2017, or learned row
    and column embeddings as in DALL-E."""
    architecture: Architecture = "decoder_only"
    """One causal Transformer over caption and image as in DALL-E, or a caption encoder and an
    image decoder as in DALL-E mini."""
    num_encoder_layers: int = 0
    """Transformer blocks of the caption encoder, if there is one; ``num_layers`` are the
    decoder's."""
    attention: Attention = "dense"
    """What an image token attends to: all before it, or row, column and, in the last layer,
    convolutional masks as in DALL-E (Ramesh et al. 2021, arXiv:2102.12092, figure 11), for raster
    order only."""
    kernel_size: int = 11
    """Side of the convolutional mask, odd; 11 on the 32 x 32 tokens of DALL-E."""
    block: Block = "swiglu"
    """``swiglu``: SwiGLU (Shazeer 2020, arXiv:2002.05202), QK-norm, no biases. ``gelu``: GELU of
    four times the width, biases, no QK-norm, as in GPT-2 (Radford et al. 2019) and DALL-E."""
    has_target_positions: bool = True
    """Tell each position which grid cell comes next (RAR, Yu et al. 2024, arXiv:2411.00776);
    without it, as in DALL-E, raster order only."""

    def __post_init__(self) -> None:
        require_positive(self, ("hidden_size", "num_layers", "num_heads"), prefix="decoder.")
        # Rotary positions: one half of a head turns by row, the other by column, each in pairs.
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"decoder.hidden_size: got {self.hidden_size}, expected a multiple of "
                f"4 * num_heads = {4 * self.num_heads}"
            )
        require_dropout_probability(self, prefix="decoder.")
        choices = {
            "positions": ImagePositions,
            "attention": Attention,
            "block": Block,
            "architecture": Architecture,
        }
        for name, words in choices.items():
            if getattr(self, name) not in get_args(words):
                raise ValueError(
                    f"decoder.{name}: got {getattr(self, name)!r}, "
                    f"expected one of {', '.join(get_args(words))}"
                )
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(
                f"decoder.kernel_size: got {self.kernel_size}, expected an odd number from 1 on"
            )
        self._check_architecture()

    def _check_architecture(self) -> None:
        if self.has_encoder != (self.num_encoder_layers > 0) or self.num_encoder_layers < 0:
            expected = "at least 1" if self.has_encoder else "0"
            raise ValueError(
                f"decoder.num_encoder_layers: got {self.num_encoder_layers}, "
                f"expected {expected} with architecture {self.architecture}"
            )
        if not self.has_encoder:
            return
        # An option that would be ignored is refused: the config says what the model is.
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ENCODER_DECODER_FIELDS and value != field.default:
                raise ValueError(
                    f"decoder.{field.name}: got {value!r}, expected {field.default!r} with "
                    f"architecture {self.architecture}"
                )

    @property
    def has_encoder(self) -> bool:
        """Whether an encoder reads the caption."""
        return self.architecture == "encoder_decoder"

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.hidden_size // self.num_heads

    @property
    def intermediate_size(self) -> int:
        """Width inside the feed-forward network."""
        if self.block == "gelu":
            return 4 * self.hidden_size
        # SwiGLU has three matrices instead of two: 8/3 of the width makes as many weights. Rounded
        # up to a multiple of 64 for fast products.
        return -(-8 * self.hidden_size // (3 * 64)) * 64

    @property
    def block_options(self) -> BlockOptions:
        """How the blocks are built."""
        return RADFORD_2019 if self.block == "gelu" else DEFAULT_OPTIONS

    @property
    def raster_order_only(self) -> bool:
        """Whether no training could make this decoder generate in any other order."""
        return self.attention == "dalle" or not self.has_target_positions


@dataclass(frozen=True, kw_only=True)
class DalleConfig:
    """Everything that decides the shapes of a decoder's weights."""

    decoder: DecoderConfig
    """Width, depth and positions."""
    vocab_size: int
    """Number of different caption tokens, pad included."""
    text_length: int
    """Caption tokens per image, padded or truncated to this."""
    codebook_levels: tuple[int, ...]
    """Digits of an image token: (8, 5, 5, 5) for FSQ with these levels, (1024,) for 1024 codes
    without such structure. Their product is the codebook size."""
    image_grid_size: tuple[int, int]
    """Image tokens along (height, width)."""

    def __post_init__(self) -> None:
        require_positive(self, ("vocab_size", "text_length"))
        if not self.codebook_levels or min(self.codebook_levels) < 1:
            raise ValueError(
                f"codebook_levels: got {self.codebook_levels}, expected positive sizes"
            )
        if min(self.image_grid_size) < 1:
            raise ValueError(
                f"image_grid_size: got {self.image_grid_size}, expected positive sizes"
            )
        # Checked from the config alone, before a hostile folder's sizes are allocated.
        if self.decoder.raster_order_only and self.sequence_length > MAX_MASKED_LENGTH:
            raise ValueError(
                f"image_grid_size: got {self.image_grid_size}, with the caption "
                f"{self.sequence_length} positions, expected at most {MAX_MASKED_LENGTH}"
            )

    @property
    def codebook_size(self) -> int:
        """Number of different image tokens."""
        return prod(self.codebook_levels)

    @property
    def image_length(self) -> int:
        """Image tokens per image."""
        return self.image_grid_size[0] * self.image_grid_size[1]

    @property
    def sequence_length(self) -> int:
        """Input positions of the decoder: start, caption (if no encoder reads it), image."""
        # The last image token is never read; the start takes its place.
        return self.image_length + (0 if self.decoder.has_encoder else self.text_length)
