"""The discrete VAE: an image becomes a grid of tokens, and a grid of tokens an image.

Read ``encode_to_token_ids`` and ``decode_from_token_ids``: the rest of the project sees only them.
Sources: van den Oord et al. 2017 (arXiv:1711.00937), Ramesh et al. 2021 (arXiv:2102.12092),
Mentzer et al. 2023 (arXiv:2309.15505).
"""

import dataclasses
import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vqvae import serialization
from vqvae.config import VQVAEConfig
from vqvae.dalle_networks import DalleDecoder, DalleEncoder
from vqvae.image_tokenizer import require_pixels, require_token_ids
from vqvae.logit_laplace import logit_laplace_pixels
from vqvae.networks import Decoder, Encoder
from vqvae.perturbation import Perturbation, perturb_latents
from vqvae.quantizers import FiniteScalarQuantizer, GumbelQuantizer, VectorQuantizer

Quantizer = FiniteScalarQuantizer | VectorQuantizer | GumbelQuantizer


class VQVAE(nn.Module):
    """Encoder, quantizer and decoder over images of one size; an ``ImageTokenizer``."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.predicts_distribution = config.decoder_output == "logit_laplace"
        # DALL-E mixes codes in float32, whatever the precision of the networks.
        self.quantizes_in_float32 = config.architecture == "dalle"
        self.quantizer = build_quantizer(config)
        self.encoder, self.decoder = build_networks(config, self.quantizer)

    def forward(
        self,
        pixels: Float[Tensor, "batch 3 image_height image_width"],
        *,
        generator: torch.Generator | None = None,
        perturbation: Perturbation | None = None,
    ) -> "VQVAEOutput":
        """Reconstruct images in [-1, 1] through the quantizer, with gradients.

        ``generator`` is the source of all noise (Gumbel, k-means start, restarts, perturbation).
        """
        encoder_latents = self.encoder(pixels)  # (batch, latent_dim, height, width)
        float32 = torch.autocast(pixels.device.type, enabled=False)
        with float32 if self.quantizes_in_float32 else nullcontext():
            quantized = self.quantizer(encoder_latents, generator=generator)
        latents = quantized.quantized_latents  # (batch, code_dim, height, width)
        # The decoder sees wrong codes, the encoder and the token ids do not.
        if perturbation is not None:
            latents = perturb_latents(quantized, self.codebook(), perturbation, generator=generator)
        maps = self.decoder(latents)
        return VQVAEOutput(
            self._to_pixels(maps),
            quantized.token_ids,
            quantized.loss,
            quantized.metrics,
            maps if self.predicts_distribution else None,
            encoder_latents,
        )

    @torch.no_grad()
    def encode_to_token_ids(
        self, pixels: Float[Tensor, "batch 3 image_height image_width"]
    ) -> Int[Tensor, "batch height width"]:
        """Images to tokens."""
        require_pixels(pixels, self.config.pixel_size)
        return self.quantizer.encode(self.encoder(pixels))

    @torch.no_grad()
    def decode_from_token_ids(
        self, token_ids: Int[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch 3 image_height image_width"]:
        """Tokens to images."""
        require_token_ids(token_ids, self.codebook_size)
        return self.decode_from_latents(self.quantizer.decode(token_ids)).clamp(-1, 1)

    def decode_from_latents(
        self, quantized_latents: Float[Tensor, "batch code_dim height width"]
    ) -> Float[Tensor, "batch 3 image_height image_width"]:
        """Decode codes, or mixtures of codes, to pixels, nominally in [-1, 1] but not clamped."""
        return self._to_pixels(self.decoder(quantized_latents))

    def _to_pixels(self, maps: Tensor) -> Tensor:
        return logit_laplace_pixels(maps) if self.predicts_distribution else maps

    @torch.no_grad()
    def codebook(self) -> Float[Tensor, "codebook_size code_dim"]:
        """Return all codes, in the order of their ids."""
        device = next(self.parameters()).device
        ids = torch.arange(self.codebook_size, device=device)
        return self.quantizer.decode(ids[None, None])[0, :, 0].T

    @property
    def codebook_size(self) -> int:
        """Number of different tokens."""
        return self.config.codebook_size

    @property
    def codebook_levels(self) -> tuple[int, ...]:
        """Digits of a token."""
        return self.config.codebook_levels

    @property
    def image_grid_size(self) -> tuple[int, int]:
        """Tokens along (height, width)."""
        return self.config.image_grid_size

    def fingerprint(self) -> str:
        """Hash config and weights."""
        # Not the quantizer's state of training (moving averages, temperature): it decides no token.
        weights = {
            name: tensor
            for name, tensor in self.state_dict().items()
            if name == "quantizer.codebook" or not name.startswith("quantizer.")
        }
        return serialization.hash_weights(dataclasses.asdict(self.config), weights.items())

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write a folder for ``from_pretrained``."""
        serialization.save_tokenizer(folder, self, dataclasses.asdict(self.config), dtype=dtype)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "VQVAE":
        """Load a folder of ``save_pretrained``, in evaluation mode; ``ValueError`` if damaged."""
        folder = Path(folder)
        path = serialization.own_file(folder, serialization.CONFIG_NAME)
        values = serialization.read_json(path)
        with serialization.located(path):
            values = serialization.without_version(values)
            config = serialization.build_config(VQVAEConfig, values)
        # Refuse sizes that the weights cannot have before anything is built.
        path = serialization.own_file(folder, serialization.WEIGHTS_NAME)
        blocks = serialization.sizes_of(config, "num_encoder_blocks", "num_decoder_blocks")
        model = serialization.build_checked(
            lambda: cls(config),
            path,
            counts={**blocks, "channels": len(config.channels)},
            sizes=serialization.sizes_of(config, "channels", "patch_size"),
            num_elements=_min_elements(config),
        )
        return serialization.load_weights(model, path)


class VQVAEOutput(NamedTuple):
    """The output of one training pass of the tokenizer."""

    reconstruction: Float[Tensor, "batch 3 image_height image_width"]
    token_ids: Int[Tensor, "batch height width"]
    quantizer_loss: Float[Tensor, ""]
    quantizer_metrics: dict[str, Tensor]
    # mu and ln b of each pixel value; None if the decoder predicts pixels.
    logit_laplace: Float[Tensor, "batch 6 image_height image_width"] | None = None
    # The input of the quantizer.
    encoder_latents: Float[Tensor, "batch latent_dim height width"] | None = None
    # Of vqvae.losses.causal; None without a predictor.
    next_feature_loss: Float[Tensor, ""] | None = None


def build_quantizer(config: VQVAEConfig) -> Quantizer:
    """Build the quantizer that ``config.quantizer`` names."""
    if config.quantizer == "fsq":
        return FiniteScalarQuantizer(levels=config.fsq_levels)
    if config.quantizer == "vq":
        return VectorQuantizer(codebook_size=config.vq_codebook_size, code_dim=config.vq_code_dim)
    return GumbelQuantizer(codebook_size=config.vq_codebook_size, code_dim=config.vq_code_dim)


def build_networks(config: VQVAEConfig, quantizer: Quantizer) -> tuple[nn.Module, nn.Module]:
    """Build the encoder and the decoder that ``config.architecture`` names."""
    channels, latent_dim, code_dim = config.channels, quantizer.latent_dim, quantizer.code_dim
    encoder_blocks, decoder_blocks = config.num_encoder_blocks, config.num_decoder_blocks
    num_maps = 3 if config.decoder_output == "pixels" else 6
    if config.architecture == "dalle":
        # As published: the codebook is a convolution from one-hot codes, its fan-in their number.
        if isinstance(quantizer, GumbelQuantizer):
            nn.init.normal_(quantizer.codebook, std=config.vq_codebook_size**-0.5)
        return (
            DalleEncoder(channels, latent_dim=latent_dim, num_blocks=encoder_blocks),
            DalleDecoder(channels, code_dim=code_dim, num_blocks=decoder_blocks, num_maps=num_maps),
        )
    encoder = Encoder(
        channels,
        patch_size=config.patch_size,
        latent_dim=latent_dim,
        num_blocks=encoder_blocks,
        kernel_size=config.encoder_kernel_size,
    )
    decoder = Decoder(
        channels,
        patch_size=config.patch_size,
        code_dim=code_dim,
        num_blocks=decoder_blocks,
        num_maps=num_maps,
    )
    return encoder, decoder


def _min_elements(config: VQVAEConfig) -> int:
    """Return a lower bound of the number of weights: 1 x 1 kernels, no biases."""
    channels = config.channels
    blocks = config.num_encoder_blocks + config.num_decoder_blocks
    if config.architecture == "dalle":
        blocks //= 4  # bottlenecks of a quarter of the width
    codebook = 0 if config.quantizer == "fsq" else config.vq_codebook_size * config.vq_code_dim
    first = 3 * config.patch_size**2 * channels[0]
    between = sum(width * next_width for width, next_width in itertools.pairwise(channels))
    return first + between + blocks * sum(width**2 for width in channels) + codebook
