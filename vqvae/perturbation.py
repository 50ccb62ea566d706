"""Wrong tokens on purpose, so that the decoder learns to live with what a sampler gets wrong.

Source: Qiu et al. 2025 (arXiv:2503.08354): in a fraction of the images a fraction of the tokens is
replaced by one of the nearest codes. What we do otherwise: nearness is that of the codes to the
chosen code, so that one rule serves every quantizer; the fraction of tokens is generated for each image.
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
    """Fraction of the images that are touched, in [0, 1]."""
    token_fraction: float
    """Largest fraction of such an image's tokens; each image's own is uniform up to this."""
    num_neighbours: int
    """Nearest codes to generate from; the codebook's size, or more, means any other code."""


def perturb_latents(
    quantized: QuantizerOutput,
    codebook: Float[Tensor, "codebook_size code_dim"],
    perturbation: Perturbation,
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch code_dim height width"]:
    """Replace some codes by others that are near.

    Args:
        quantized: The latents and tokens of a batch.
        codebook: All codes, in the order of their ids.
        perturbation: How much.
        generator: Generates images, tokens and codes.

    Returns:
        What the decoder is to receive; gradients pass as if nothing had been replaced.
    """
    latents, token_ids = quantized.quantized_latents, quantized.token_ids
    device = token_ids.device if generator is None else generator.device
    uniforms = torch.rand((2, len(token_ids), 1, 1), generator=generator, device=device)
    tokens = torch.rand(token_ids.shape, generator=generator, device=device)
    others = torch.rand(token_ids.shape, generator=generator, device=device)
    touched = (uniforms[0] < perturbation.image_fraction) & (
        tokens < uniforms[1] * perturbation.token_fraction
    )
    touched, others = touched.to(token_ids.device), others.to(token_ids.device)
    codes = codebook.detach().float()
    count = min(perturbation.num_neighbours, len(codes) - 1)
    chosen = token_ids[touched]
    distances = torch.cdist(codes[chosen], codes)
    distances = distances.scatter(1, chosen[:, None], torch.inf)  # not the code itself
    near = distances.topk(count, dim=1, largest=False).indices
    pick = (others[touched] * count).long()
    replaced = token_ids.masked_scatter(touched, near.gather(1, pick[:, None])[:, 0])
    wrong = rearrange(codes[replaced], "b h w c -> b c h w").to(latents.dtype)
    return torch.where(touched[:, None], latents + (wrong - latents).detach(), latents)
