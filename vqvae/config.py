"""What an image tokenizer is: one frozen dataclass, checked when it is made."""

from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

QuantizerName = Literal["fsq", "vq", "gumbel"]
EncoderKernelSize = Literal[1, 3]
Architecture = Literal["patches", "dalle"]
DecoderOutput = Literal["pixels", "logit_laplace"]


@dataclass(frozen=True, kw_only=True)
class VQVAEConfig:
    """Sizes of the discrete VAE.

    The first stage works on blocks of ``patch_size`` pixels a side and every further stage halves
    the grid, so an image shrinks ``patch_size * 2 ** (len(channels) - 1)`` times.

    DALL-E's own tokenizer (Ramesh et al. 2021, arXiv:2102.12092) has ``architecture`` dalle,
    ``decoder_output`` logit_laplace, ``image_size`` 256, ``patch_size`` 1, ``channels`` 256, 512,
    1024, 2048, two blocks per stage, and ``gumbel`` over 8192 codes of length 128.

    Raises:
        ValueError: If a size is out of range, the image does not divide into the grid or the
            quantizer is unknown.
    """

    image_size: int = 64
    """Height and width of an image, in pixels."""
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
    """What the decoder says of a pixel: its value, or a logit-Laplace distribution, by whose
    likelihood it is then trained."""

    def __post_init__(self) -> None:
        """Refuse sizes that no network can be built from."""
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"channels: got {self.channels}, expected one positive size per stage")
        if self.patch_size < 1:
            raise ValueError(f"patch_size: got {self.patch_size}, expected at least 1")
        if self.image_size < 1 or self.image_size % self.downsampling:
            raise ValueError(
                f"image_size: got {self.image_size}, expected a multiple of {self.downsampling} "
                f"(patch_size {self.patch_size}, halved {len(self.channels) - 1} times)"
            )
        if min(self.num_encoder_blocks, self.num_decoder_blocks) < 0:
            raise ValueError(
                "num_encoder_blocks and num_decoder_blocks: got "
                f"{self.num_encoder_blocks} and {self.num_decoder_blocks}, expected 0 or more"
            )
        if self.encoder_kernel_size not in get_args(EncoderKernelSize):
            raise ValueError(
                f"encoder_kernel_size: got {self.encoder_kernel_size}, expected 1 or 3"
            )
        self._check_words()
        if not self.fsq_levels or min(self.fsq_levels) < 2:
            raise ValueError(f"fsq_levels: got {self.fsq_levels}, expected levels of 2 or more")
        if self.vq_codebook_size < 2 or self.vq_code_dim < 1:
            raise ValueError(
                f"vq_codebook_size and vq_code_dim: got {self.vq_codebook_size} and "
                f"{self.vq_code_dim}, expected at least 2 and 1"
            )

    def _check_words(self) -> None:
        for name, choices in (
            ("quantizer", QuantizerName),
            ("architecture", Architecture),
            ("decoder_output", DecoderOutput),
        ):
            got, expected = getattr(self, name), get_args(choices)
            if got not in expected:
                raise ValueError(f"{name}: got {got!r}, expected one of {', '.join(expected)}")
        if self.architecture == "dalle":
            if self.patch_size != 1:
                raise ValueError(f"patch_size: got {self.patch_size}, expected 1 for dalle")
            if any(width % 4 for width in self.channels):
                raise ValueError(
                    f"channels: got {self.channels}, expected multiples of 4 for dalle"
                )

    @property
    def downsampling(self) -> int:
        """Pixels per token along one side."""
        return self.patch_size * 2 ** (len(self.channels) - 1)

    @property
    def image_grid_size(self) -> tuple[int, int]:
        """Tokens along (height, width)."""
        side = self.image_size // self.downsampling
        return side, side

    @property
    def codebook_levels(self) -> tuple[int, ...]:
        """Digits of a token, the least significant first: FSQ's levels, or one for all codes."""
        return self.fsq_levels if self.quantizer == "fsq" else (self.vq_codebook_size,)

    @property
    def codebook_size(self) -> int:
        """Number of different tokens."""
        return prod(self.codebook_levels)
