"""The encoder and decoder of DALL-E's discrete VAE, at any size.

Source: Ramesh et al. 2021, arXiv:2102.12092, appendix A, and the code published with it
(github.com/openai/DALL-E). Groups of bottleneck blocks; the encoder halves the grid between groups
by max-pooling, the decoder doubles it by repeating cells. The published sizes are channels 256,
512, 1024, 2048 and two blocks per group.

What differs: the decoder's first 1 x 1 convolution, from a one-hot code to 128 channels, is here
the quantizer's codebook, its bias being part of every code. The codes therefore do not decay.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vqvae.logit_laplace import to_open_interval


class BottleneckBlock(nn.Module):
    """An identity (or a 1 x 1 convolution) plus ``gain`` times four convolutions.

    The four work at a quarter of the width, with the odd ``kernel_sizes``.
    """

    def __init__(
        self, channels_in: int, channels_out: int, *, kernel_sizes: Sequence[int], gain: float
    ) -> None:
        super().__init__()
        self.gain = gain
        hidden = channels_out // 4
        widths = (channels_in, hidden, hidden, hidden, channels_out)
        layers: list[nn.Module] = []
        for index, kernel_size in enumerate(kernel_sizes):
            layers += [nn.ReLU(), _convolution(widths[index], widths[index + 1], kernel_size)]
        self.residual = nn.Sequential(*layers)
        same = channels_in == channels_out
        self.skip = nn.Identity() if same else _convolution(channels_in, channels_out, 1)

    def forward(
        self, features: Float[Tensor, "batch channels_in height width"]
    ) -> Float[Tensor, "batch channels_out height width"]:
        """Add the scaled residual branch to the features."""
        return self.skip(features) + self.gain * self.residual(features)


class DalleEncoder(nn.Module):
    """Pixels to logits over the codebook, ``latent_dim`` codes.

    ``channels`` are multiples of 4, one for each group of ``num_blocks``, finest first.
    """

    def __init__(self, channels: Sequence[int], *, latent_dim: int, num_blocks: int) -> None:
        super().__init__()
        gain = _gain(channels, num_blocks)
        layers: list[nn.Module] = [_convolution(3, channels[0], 7)]
        before = channels[0]
        for group, width in enumerate(channels):
            if group > 0:
                layers.append(nn.MaxPool2d(2))
            for _ in range(num_blocks):
                layers.append(BottleneckBlock(before, width, kernel_sizes=(3, 3, 3, 1), gain=gain))
                before = width
        self.layers = nn.Sequential(*layers, nn.ReLU())
        self.output = _convolution(before, latent_dim, 1)

    def forward(
        self, pixels: Float[Tensor, "batch 3 image_height image_width"]
    ) -> Float[Tensor, "batch latent_dim height width"]:
        """Map pixels in [-1, 1] to float32 logits, whatever the precision of the other layers."""
        features = self.layers(to_open_interval(pixels))
        # In bfloat16 the best and the second-best of thousands of codes would often tie.
        with torch.autocast(features.device.type, enabled=False):
            return self.output(features.float())


class DalleDecoder(nn.Module):
    """Codes, or mixtures of codes, to ``num_maps`` numbers per pixel: 3 values or 6 parameters."""

    def __init__(
        self, channels: Sequence[int], *, code_dim: int, num_blocks: int, num_maps: int
    ) -> None:
        super().__init__()
        gain = _gain(channels, num_blocks)
        # The encoder's channels in reverse, coarsest first; the grid doubles between groups.
        layers: list[nn.Module] = []
        before = code_dim
        for group, width in enumerate(reversed(channels)):
            if group > 0:
                layers.append(nn.Upsample(scale_factor=2, mode="nearest"))
            for _ in range(num_blocks):
                layers.append(BottleneckBlock(before, width, kernel_sizes=(1, 3, 3, 3), gain=gain))
                before = width
        self.layers = nn.Sequential(*layers, nn.ReLU(), _convolution(before, num_maps, 1))

    def forward(
        self, quantized_latents: Float[Tensor, "batch code_dim height width"]
    ) -> Float[Tensor, "batch maps image_height image_width"]:
        """Map codes to 3 or 6 numbers per pixel."""
        return self.layers(quantized_latents)


def _gain(channels: Sequence[int], num_blocks: int) -> float:
    # As in the published code: the more blocks, the nearer a network starts to the identity.
    return 1 / max(1, len(channels) * num_blocks) ** 2


def _convolution(channels_in: int, channels_out: int, kernel_size: int) -> nn.Conv2d:
    """A convolution with weights of variance 1 / fan-in and biases of 0."""
    layer = nn.Conv2d(channels_in, channels_out, kernel_size, padding=kernel_size // 2)
    nn.init.normal_(layer.weight, std=(channels_in * kernel_size**2) ** -0.5)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer
