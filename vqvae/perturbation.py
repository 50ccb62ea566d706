"""Latent perturbation: random wrong tokens make the decoder robust to sampling errors.

Source: Qiu et al. 2025 (arXiv:2503.08354): in a fraction of the images a fraction of the tokens is
replaced by one of the nearest codes. Deviations: neighbors are those of the chosen code, so that
one rule serves every quantizer; the fraction of tokens is sampled for each image.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from vqvae.quantizers.output import QuantizerOutput


@dataclass(frozen=True)
class Perturbation:
    """How many tokens are replaced, and by what."""

    image_fraction: float
    """Fraction of the images with replaced tokens, in [0, 1]."""
    token_fraction: float
    """Largest fraction of such an image's tokens; each image's own is uniform up to this."""
    num_neighbors: int
    """Nearest codes to sample from; the codebook's size, or more, means any other code."""


def perturb_latents(
    quantized: QuantizerOutput,
    codebook: Float[Tensor, "codebook_size code_dim"],
    perturbation: Perturbation,
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch code_dim height width"]:
    """Return latents in which some codes are replaced by near ones.

    ``codebook`` has all codes in the order of their ids. The gradient is that of the old latents.
    """
    latents, token_ids = quantized.quantized_latents, quantized.token_ids
    # 1. choose the tokens: a few images, and in each its own fraction
    device = token_ids.device if generator is None else generator.device
    of_images = torch.rand((2, len(token_ids), 1, 1), generator=generator, device=device)
    of_tokens = torch.rand(token_ids.shape, generator=generator, device=device)
    of_codes = torch.rand(token_ids.shape, generator=generator, device=device)
    is_replaced = (of_images[0] < perturbation.image_fraction) & (
        of_tokens < of_images[1] * perturbation.token_fraction
    )
    is_replaced, of_codes = is_replaced.to(token_ids.device), of_codes.to(token_ids.device)
    # 2. sample one of the nearest codes for each, never the code itself
    codes = codebook.detach().float()
    count = min(perturbation.num_neighbors, len(codes) - 1)
    chosen = token_ids[is_replaced]
    distances = torch.cdist(codes[chosen], codes).scatter(1, chosen[:, None], torch.inf)
    nearest = distances.topk(count, dim=1, largest=False).indices
    rank = (of_codes[is_replaced] * count).long()
    replaced = token_ids.masked_scatter(is_replaced, nearest.gather(1, rank[:, None])[:, 0])
    # 3. straight through: the values of the new codes, the gradient of the old ones
    wrong = rearrange(codes[replaced], "b h w c -> b c h w").to(latents.dtype)
    return torch.where(is_replaced[:, None], latents + (wrong - latents).detach(), latents)
