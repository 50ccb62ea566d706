"""The relaxed quantizer of the DALL-E discrete VAE.

Source: Ramesh et al. 2021, arXiv:2102.12092, section 2.1 and appendix A.2: the encoder predicts a
distribution over the codebook at each grid cell, training mixes codes with Gumbel-softmax weights
(arXiv:1611.00712, arXiv:1611.01144), and a KL term keeps the distribution near the uniform one.
"""

import math
from contextlib import nullcontext

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from vqvae.quantizers.output import QuantizerOutput, require_sizes

# DALL-E's weight of 6.6 belongs to a KL summed over 32 x 32 cells, in a loss divided by the
# 256 x 256 x 3 pixel values. With means over cells and over pixel values that is 6.6 / 192.
DALLE_KL_WEIGHT = 6.6 / 192


class GumbelQuantizer(nn.Module):
    """Mix codes with Gumbel-softmax weights in training mode, take the most likely code otherwise.

    Attributes:
        temperature: Scalar buffer, 1 at first; the trainer lowers it (`temperature.fill_(...)`).
        kl_weight: Of the divergence to the uniform distribution, per nat and cell; the trainer may
            raise it from 0.
    """

    temperature: Tensor

    def __init__(
        self, *, codebook_size: int, code_dim: int, kl_weight: float = DALLE_KL_WEIGHT
    ) -> None:
        super().__init__()
        require_sizes(codebook_size=codebook_size, code_dim=code_dim)
        if kl_weight < 0:
            raise ValueError(f"kl_weight: got {kl_weight}, expected at least 0")
        self.codebook_size = self.latent_dim = codebook_size
        self.code_dim = code_dim
        self.kl_weight = kl_weight
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_dim))
        self.register_buffer("temperature", torch.tensor(1.0))

    def forward(
        self,
        encoder_latents: Float[Tensor, "batch latent_dim height width"],
        *,
        generator: torch.Generator | None = None,
    ) -> QuantizerOutput:
        """Quantize logits over the codebook; `generator` is the source of the Gumbel noise.

        The token ids are the most likely ones, without noise, in both modes. The loss is the
        weighted KL term, the metric "kl" is in nats per grid cell.
        """
        batch, _, height, _ = encoder_latents.shape
        logits = _to_rows(encoder_latents)
        best = logits.max(dim=1).indices
        rows = self._mix(logits, generator) if self.training else self.codebook[best]
        with nullcontext() if self.kl_weight else torch.no_grad():  # without a weight, a metric
            # KL(q || uniform) = log(codebook_size) - entropy(q)
            log_probabilities = logits.log_softmax(dim=1)
            entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=1)
            kl = math.log(self.codebook_size) - entropy.mean()
        return QuantizerOutput(
            quantized_latents=_to_grid(rows, like=encoder_latents),
            token_ids=rearrange(best, "(b h w) -> b h w", b=batch, h=height),
            loss=self.kl_weight * kl,
            metrics={"kl": kl.detach()},
        )

    def soft_latents(
        self,
        encoder_latents: Float[Tensor, "batch latent_dim height width"],
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch code_dim height width"]:
        """Return the decoder's input in training: codes mixed at the current temperature."""
        return _to_grid(self._mix(_to_rows(encoder_latents), generator), like=encoder_latents)

    def features(
        self, encoder_latents: Float[Tensor, "batch latent_dim height width"]
    ) -> Float[Tensor, "batch code_dim height width"]:
        """Return the mean code under the logits, with gradients, without noise or temperature."""
        probabilities = _to_rows(encoder_latents).softmax(dim=1)
        return _to_grid(probabilities @ self.codebook, like=encoder_latents)

    def encode(
        self, encoder_latents: Float[Tensor, "batch latent_dim height width"]
    ) -> Int[Tensor, "batch height width"]:
        """Return the most likely token ids."""
        return encoder_latents.argmax(dim=1)

    def decode(
        self, token_ids: Int[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch code_dim height width"]:
        """Return the codebook rows that the token ids stand for."""
        return rearrange(self.codebook[token_ids], "b h w c -> b c h w")

    def _mix(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        # Gumbel noise is -log(-log(uniform)); a uniform of 0 gives -inf, weight 0. On a CPU
        # `exponential_` would take three times as long.
        uniform = _uniform(logits, generator)
        gumbel_noise = uniform.log_().neg_().log_().neg_().to(logits.device)
        weights = (logits + gumbel_noise).div_(self.temperature.float()).softmax(dim=1)
        return weights.to(self.codebook.dtype) @ self.codebook


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Sample float32 numbers from [0, 1); on a CPU with numpy, in half of torch's time."""
    device = like.device if generator is None else generator.device
    if device.type != "cpu" or torch.compiler.is_compiling():
        return torch.rand(like.shape, generator=generator, device=device)
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    return torch.from_numpy(np.random.default_rng(seed).random(like.shape, dtype=np.float32))


def _to_rows(encoder_latents: Tensor) -> Tensor:
    # Softmax is fastest along the last, contiguous axis.
    return rearrange(encoder_latents, "b c h w -> (b h w) c").float()


def _to_grid(rows: Tensor, *, like: Tensor) -> Tensor:
    batch, _, height, _ = like.shape
    return rearrange(rows, "(b h w) c -> b c h w", b=batch, h=height).to(like.dtype)
