"""The discrete VAE: an image becomes a grid of tokens, and a grid of tokens an image.

Read ``encode_to_token_ids`` and ``decode_from_token_ids``: the rest of the project sees only them.
Sources: van den Oord et al. 2017 (arXiv:1711.00937), Ramesh et al. 2021 (arXiv:2102.12092),
Mentzer et al. 2023 (arXiv:2309.15505).
"""

import dataclasses
import itertools
import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vqvae.config import VQVAEConfig
from vqvae.dalle_networks import DalleDecoder, DalleEncoder
from vqvae.image_tokenizer import require_pixels, require_token_ids
from vqvae.logit_laplace import logit_laplace_pixels
from vqvae.networks import Decoder, Encoder
from vqvae.perturbation import Perturbation, perturb_latents
from vqvae.quantizers import FiniteScalarQuantizer, GumbelQuantizer, VectorQuantizer
from vqvae.serialization import (
    build_checked,
    build_config,
    hash_weights,
    load_weights,
    own_file,
    read_json,
    save_weights,
    shown,
)

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
FORMAT_VERSION = 1
BLOCK_COUNTS = ("num_encoder_blocks", "num_decoder_blocks")
# Fields younger than the first saved models. At their defaults they are neither stored nor hashed,
# so that those models keep their fingerprints.
LATER_FIELDS = {"architecture": "patches", "decoder_output": "pixels"}


class VQVAEOutput(NamedTuple):
    """What one training pass of the tokenizer returns."""

    reconstruction: Float[Tensor, "batch 3 image_height image_width"]
    token_ids: Int[Tensor, "batch height width"]
    quantizer_loss: Float[Tensor, ""]
    quantizer_metrics: dict[str, Tensor]
    logit_laplace: Float[Tensor, "batch 6 image_height image_width"] | None = None
    """mu and ln b of each pixel value; None if the decoder gives pixels."""
    encoder_latents: Float[Tensor, "batch latent_dim height width"] | None = None
    """What was quantized."""
    next_feature_loss: Float[Tensor, ""] | None = None
    """How badly the next feature is foretold; None without a predictor."""


class VQVAE(nn.Module):
    """Encoder, quantizer and decoder over square images."""

    def __init__(self, config: VQVAEConfig) -> None:
        """Build the networks of ``config`` with random weights.

        Args:
            config: Sizes and the kind of quantizer.
        """
        super().__init__()
        self.config = config
        self.quantizer = build_quantizer(config)
        self.encoder, self.decoder = build_networks(config, self.quantizer)

    def forward(
        self,
        pixels: Float[Tensor, "batch 3 image_height image_width"],
        *,
        generator: torch.Generator | None = None,
        perturbation: Perturbation | None = None,
    ) -> VQVAEOutput:
        """Reconstruct images through the quantizer, with gradients.

        Args:
            pixels: In [-1, 1].
            generator: Source of the quantizer's noise (Gumbel, k-means start, restarts).
            perturbation: Wrong tokens that the decoder is to learn from, if any.

        Returns:
            Reconstruction, token ids, and the quantizer's own loss and metrics.
        """
        encoder_latents = self.encoder(pixels)
        with self._quantizer_precision(pixels.device):
            quantized = self.quantizer(encoder_latents, generator=generator)
        latents = quantized.quantized_latents
        if perturbation is not None:
            latents = perturb_latents(
                quantized, self._codebook(), perturbation, generator=generator
            )
        maps = self.decoder(latents)
        return VQVAEOutput(
            self._to_pixels(maps),
            quantized.token_ids,
            quantized.loss,
            quantized.metrics,
            None if self.config.decoder_output == "pixels" else maps,
            encoder_latents,
        )

    @torch.no_grad()
    def encode_to_token_ids(
        self, pixels: Float[Tensor, "batch 3 image_height image_width"]
    ) -> Int[Tensor, "batch height width"]:
        """Turn images into their tokens.

        Args:
            pixels: In [-1, 1]; height and width must equal ``config.image_size``.

        Returns:
            int64 ids in [0, codebook_size).

        Raises:
            ValueError: If the images have another size.
        """
        require_pixels(pixels, self.config.image_size)
        return self.quantizer.encode(self.encoder(pixels))

    @torch.no_grad()
    def decode_from_token_ids(
        self, token_ids: Int[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch 3 image_height image_width"]:
        """Turn tokens into images.

        Args:
            token_ids: Ids in [0, codebook_size).

        Returns:
            Pixels clamped to [-1, 1].

        Raises:
            ValueError: If an id is outside the codebook.
        """
        require_token_ids(token_ids, self.codebook_size)
        return self.decode_from_latents(self.quantizer.decode(token_ids)).clamp(-1, 1)

    def decode_from_latents(
        self, quantized_latents: Float[Tensor, "batch code_dim height width"]
    ) -> Float[Tensor, "batch 3 image_height image_width"]:
        """Turn codes, or mixtures of codes, into images.

        Args:
            quantized_latents: As the quantizer gives them.

        Returns:
            Pixels, nominally in [-1, 1] but not clamped.
        """
        return self._to_pixels(self.decoder(quantized_latents))

    def _to_pixels(self, maps: Tensor) -> Tensor:
        return maps if self.config.decoder_output == "pixels" else logit_laplace_pixels(maps)

    def _quantizer_precision(self, device: torch.device) -> AbstractContextManager[Any]:
        """DALL-E keeps the mixing of codes in float32."""
        if self.config.architecture == "patches":
            return nullcontext()
        return torch.autocast(device.type, enabled=False)

    @torch.no_grad()
    def _codebook(self) -> Float[Tensor, "codebook_size code_dim"]:
        device = next(self.parameters()).device
        ids = torch.arange(self.codebook_size, device=device)
        return self.quantizer.decode(ids[None, None])[0, :, 0].T

    @property
    def codebook_size(self) -> int:
        """Number of different tokens."""
        return self.config.codebook_size

    @property
    def codebook_levels(self) -> tuple[int, ...]:
        """Digits of a token, the least significant first."""
        return self.config.codebook_levels

    @property
    def image_grid_size(self) -> tuple[int, int]:
        """Tokens along (height, width)."""
        return self.config.image_grid_size

    def fingerprint(self) -> str:
        """Hash config and weights: equal fingerprints mean equal tokens for equal images.

        What a quantizer keeps for its training alone (moving averages, a temperature) is left out.

        Returns:
            16 hexadecimal digits.
        """
        kept = (
            (name, tensor)
            for name, tensor in self.state_dict().items()
            if name == "quantizer.codebook" or not name.startswith("quantizer.")
        )
        return hash_weights(_stored_config(self.config), kept)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write ``config.json`` and ``model.safetensors`` into ``folder``.

        Args:
            folder: Made if missing.
            dtype: Of the stored weights; they are read back as float32.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(self, folder / WEIGHTS_NAME, dtype=dtype)
        config = {"format_version": FORMAT_VERSION, **_stored_config(self.config)}
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "VQVAE":
        """Load what ``save_pretrained`` wrote, strictly.

        Args:
            folder: Holds ``config.json`` and ``model.safetensors``.

        Returns:
            The tokenizer in evaluation mode.

        Raises:
            ValueError: If a file is missing or damaged, a config key or tensor unknown or missing.
        """
        folder = Path(folder)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (folder / name).is_file():
                raise ValueError(f"image tokenizer {folder}: no {name} there")
        config = _read_config(own_file(folder, CONFIG_NAME))
        path = own_file(folder, WEIGHTS_NAME)
        counts = {name: getattr(config, name) for name in BLOCK_COUNTS}
        model = build_checked(
            lambda: cls(config),
            path,
            counts={**counts, "channels": len(config.channels)},
            sizes={
                "channels": max(config.channels),
                "patch_size": config.patch_size,
                "fsq_levels": len(config.fsq_levels) if config.quantizer == "fsq" else 0,
            },
            num_elements=_least_elements(config),
        )
        return load_weights(model, path)


def build_quantizer(
    config: VQVAEConfig,
) -> FiniteScalarQuantizer | VectorQuantizer | GumbelQuantizer:
    """Build the quantizer that ``config.quantizer`` names.

    Args:
        config: A tokenizer's config.

    Returns:
        The quantizer module.
    """
    if config.quantizer == "fsq":
        return FiniteScalarQuantizer(levels=config.fsq_levels)
    if config.quantizer == "vq":
        return VectorQuantizer(codebook_size=config.vq_codebook_size, code_dim=config.vq_code_dim)
    return GumbelQuantizer(codebook_size=config.vq_codebook_size, code_dim=config.vq_code_dim)


def build_networks(
    config: VQVAEConfig, quantizer: FiniteScalarQuantizer | VectorQuantizer | GumbelQuantizer
) -> tuple[nn.Module, nn.Module]:
    """Build the networks that ``config.architecture`` names around a quantizer.

    Args:
        config: A tokenizer's config.
        quantizer: Of this config. With DALL-E's networks its Gumbel codebook starts as published.

    Returns:
        The encoder and the decoder.
    """
    latent_dim, code_dim = quantizer.latent_dim, quantizer.code_dim
    num_encoder_blocks, num_decoder_blocks = config.num_encoder_blocks, config.num_decoder_blocks
    num_maps = 3 if config.decoder_output == "pixels" else 6
    if config.architecture == "dalle":
        if isinstance(quantizer, GumbelQuantizer):  # DALL-E's convolution from one-hot codes
            nn.init.normal_(quantizer.codebook, std=config.vq_codebook_size**-0.5)
        return (
            DalleEncoder(config.channels, latent_dim=latent_dim, num_blocks=num_encoder_blocks),
            DalleDecoder(
                config.channels,
                code_dim=code_dim,
                num_blocks=num_decoder_blocks,
                num_maps=num_maps,
            ),
        )
    return (
        Encoder(
            config.channels,
            patch_size=config.patch_size,
            latent_dim=latent_dim,
            num_blocks=num_encoder_blocks,
            kernel_size=config.encoder_kernel_size,
        ),
        Decoder(
            config.channels,
            patch_size=config.patch_size,
            code_dim=code_dim,
            num_blocks=num_decoder_blocks,
            num_maps=num_maps,
        ),
    )


def _least_elements(config: VQVAEConfig) -> int:
    """Count the weights that a tokenizer has at least: kernels of one cell, without biases."""
    channels = config.channels
    blocks = config.num_encoder_blocks + config.num_decoder_blocks
    if config.architecture == "dalle":
        blocks //= 4  # bottlenecks of a quarter of the width
    codebook = 0 if config.quantizer == "fsq" else config.vq_codebook_size * config.vq_code_dim
    between = sum(one * other for one, other in itertools.pairwise(channels))
    first = 3 * config.patch_size**2 * channels[0]
    return first + between + blocks * sum(width**2 for width in channels) + codebook


def _stored_config(config: VQVAEConfig) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    return {name: value for name, value in values.items() if value != LATER_FIELDS.get(name)}


def _read_config(path: Path) -> VQVAEConfig:
    values = read_json(path)
    version = values.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version: got {shown(version)}, expected {FORMAT_VERSION}")
    try:
        return build_config(VQVAEConfig, LATER_FIELDS | values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
