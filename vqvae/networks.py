"""The convolutional encoder and decoder of the discrete VAE.

Two choices differ from VQGAN. There is no GroupNorm: its statistics run over the whole image, so
that a change of hat would change the tokens of the shoes. And the encoder's kernels are 1 x 1 by
default: a token describes its own patch, so the same face gets the same tokens in every context,
and a small decoder can recombine them.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """An identity plus two convolutions with an odd kernel."""

    def __init__(self, channels: int, *, kernel_size: int = 3) -> None:
        super().__init__()
        padding = kernel_size // 2
        first = nn.Conv2d(channels, channels, kernel_size, padding=padding)
        last = nn.Conv2d(channels, channels, kernel_size, padding=padding)
        # Every block starts as the identity, so that training is stable without normalization
        # (Zhang et al. 2019, arXiv:1901.09321).
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        self.layers = nn.Sequential(nn.SiLU(), first, nn.SiLU(), last)

    def forward(
        self, features: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Add the residual branch to the features."""
        return features + self.layers(features)


class Encoder(nn.Module):
    """Pixels to encoder latents, with ``num_blocks`` residual blocks per stage.

    ``channels`` has the width of each stage, finest first.
    """

    def __init__(
        self,
        channels: Sequence[int],
        *,
        patch_size: int,
        latent_dim: int,
        num_blocks: int,
        kernel_size: int,
    ) -> None:
        super().__init__()
        last = len(channels) - 1
        layers: list[nn.Module] = [
            nn.PixelUnshuffle(patch_size),
            nn.Conv2d(3 * patch_size**2, channels[0], kernel_size, padding=kernel_size // 2),
        ]
        for stage, width in enumerate(channels):
            layers += [ResidualBlock(width, kernel_size=kernel_size) for _ in range(num_blocks)]
            # Halve the grid without overlap: a latent must not see its neighbors' patches.
            if stage < last:
                layers.append(nn.Conv2d(width, channels[stage + 1], 2, stride=2))
        layers += [nn.SiLU(), nn.Conv2d(channels[-1], latent_dim, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(
        self, pixels: Float[Tensor, "batch 3 image_height image_width"]
    ) -> Float[Tensor, "batch latent_dim height width"]:
        """Map pixels in [-1, 1] to unbounded latents."""
        return self.layers(pixels)


class Decoder(nn.Module):
    """Quantized latents to pixels; ``channels`` as the encoder's, finest first.

    ``num_maps`` numbers per pixel: 3 values, or 6 parameters of a distribution.
    """

    def __init__(
        self,
        channels: Sequence[int],
        *,
        patch_size: int,
        code_dim: int,
        num_blocks: int,
        num_maps: int = 3,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(code_dim, channels[-1], 3, padding=1)]
        for stage in reversed(range(len(channels))):
            layers += [ResidualBlock(channels[stage]) for _ in range(num_blocks)]
            # Double the grid: every cell becomes 2 x 2 cells of a quarter of the channels.
            if stage > 0:
                layers.append(nn.Conv2d(channels[stage], 4 * channels[stage - 1], 1))
                layers.append(nn.PixelShuffle(2))
        layers += [
            nn.SiLU(),
            nn.Conv2d(channels[0], num_maps * patch_size**2, 3, padding=1),
            nn.PixelShuffle(patch_size),
        ]
        self.layers = nn.Sequential(*layers)

    def forward(
        self, quantized_latents: Float[Tensor, "batch code_dim height width"]
    ) -> Float[Tensor, "batch maps image_height image_width"]:
        """Map quantized latents to pixels, nominally in [-1, 1] but not clamped."""
        return self.layers(quantized_latents)
