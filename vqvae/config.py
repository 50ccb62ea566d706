"""The sizes of an image tokenizer: one frozen dataclass, checked when it is made."""

from dataclasses import dataclass
from math import prod
from typing import Literal, TypeAlias, get_args

QuantizerName = Literal["fsq", "vq", "gumbel"]
EncoderKernelSize = Literal[1, 3]
Architecture = Literal["patches", "dalle"]
DecoderOutput = Literal["pixels", "logit_laplace"]
ImageSize: TypeAlias = int | tuple[int, int]
LITERALS = {
    "encoder_kernel_size": EncoderKernelSize,
    "quantizer": QuantizerName,
    "architecture": Architecture,
    "decoder_output": DecoderOutput,
}


def height_and_width(image_size: ImageSize) -> tuple[int, int]:
    """Return (height, width) of an image size, which may be the one side of a square."""
    return image_size if isinstance(image_size, tuple) else (image_size, image_size)


@dataclass(frozen=True, kw_only=True)
class VQVAEConfig:
    """Sizes of the discrete VAE.

    The first stage works on blocks of ``patch_size`` pixels a side and every further stage halves
    the grid, so an image shrinks ``patch_size * 2 ** (len(channels) - 1)`` times.

    DALL-E's own tokenizer (Ramesh et al. 2021, arXiv:2102.12092) has ``architecture`` dalle,
    ``decoder_output`` logit_laplace, ``image_size`` 256, ``patch_size`` 1, ``channels`` 256, 512,
    1024, 2048, two blocks per stage, and ``gumbel`` over 8192 codes of length 128.
    """

    image_size: ImageSize = 64
    """Side of a square image in pixels, or [height, width]."""
    patch_size: int = 4
    """Pixels along a side that are folded into channels before the first stage."""
    channels: tuple[int, ...] = (96, 192)
    """Feature channels of each stage, finest first."""
    encoder_kernel_size: EncoderKernelSize = 1
    """Side of the encoder's kernels: with 1 a token sees its own patch alone, with 3 neighbors.
    Read by ``patches`` only."""
    num_encoder_blocks: int = 2
    """Residual blocks per encoder stage."""
    num_decoder_blocks: int = 2
    """Residual blocks per decoder stage."""
    quantizer: QuantizerName = "fsq"
    """How latents become tokens: finite scalars, nearest code, or Gumbel-softmax."""
    fsq_levels: tuple[int, ...] = (8, 5, 5, 5)
    """Levels of each FSQ dimension; their product is the codebook size. Read by ``fsq`` only."""
    vq_codebook_size: int = 1024
    """Number of codes. Read by ``vq`` and ``gumbel``."""
    vq_code_dim: int = 8
    """Length of a code. Read by ``vq`` and ``gumbel``."""
    architecture: Architecture = "patches"
    """Kind of networks: ours on patches, or those of DALL-E, whose ``patch_size`` is 1."""
    decoder_output: DecoderOutput = "pixels"
    """What the decoder predicts of a pixel: its value, or a logit-Laplace distribution, whose
    likelihood is then the loss."""

    def __post_init__(self) -> None:
        for name, choices in LITERALS.items():
            expected = get_args(choices)
            words = f"one of {', '.join(map(str, expected))}"
            self._require(name, getattr(self, name) in expected, words)
        # First what the derived sizes below divide by and multiply with.
        channels = self.channels
        positive = bool(channels) and min(channels) >= 1
        self._require("channels", positive, "one positive size per stage")
        for name in ("patch_size", "vq_code_dim"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("num_encoder_blocks", "num_decoder_blocks"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        self._require("vq_codebook_size", self.vq_codebook_size >= 2, "at least 2")
        if self.architecture == "dalle":
            self._require("patch_size", self.patch_size == 1, "1 for dalle")
            multiples = all(width % 4 == 0 for width in channels)
            self._require("channels", multiples, "multiples of 4 for dalle")
        self._require(
            "image_size",
            all(side >= 1 and side % self.downsampling == 0 for side in self.pixel_size),
            f"a multiple of {self.downsampling} (patch_size {self.patch_size}, "
            f"halved {len(channels) - 1} times)",
        )
        levels = self.fsq_levels
        self._require("fsq_levels", levels and min(levels) >= 2, "levels of 2 or more")
        # Token ids are int64. A hostile file may list 10^5 levels: neither multiply nor print them.
        if len(levels) > 62 or prod(levels) >= 2**63:
            raise ValueError(
                f"fsq_levels: got {len(levels)} of them, whose codes do not fit into 64 bits; "
                "expected fewer or smaller levels"
            )

    def _require(self, name: str, holds: object, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {expected}")

    @property
    def downsampling(self) -> int:
        """Pixels per token along one side."""
        return self.patch_size * 2 ** (len(self.channels) - 1)

    @property
    def pixel_size(self) -> tuple[int, int]:
        """Pixels along (height, width)."""
        return height_and_width(self.image_size)

    @property
    def image_grid_size(self) -> tuple[int, int]:
        """Tokens along (height, width)."""
        height, width = self.pixel_size
        return height // self.downsampling, width // self.downsampling

    @property
    def codebook_levels(self) -> tuple[int, ...]:
        """Digits of a token, the least significant first: FSQ's levels, or one for all codes."""
        return self.fsq_levels if self.quantizer == "fsq" else (self.vq_codebook_size,)

    @property
    def codebook_size(self) -> int:
        """Number of different tokens."""
        return prod(self.codebook_levels)
