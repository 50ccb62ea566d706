"""Vector quantization with cosine codes, learned by moving averages instead of by gradients.

Sources: van den Oord et al. 2017, arXiv:1711.00937 (commitment loss; appendix A.1 for the moving
averages); Yu et al. 2021, arXiv:2110.04627 (ViT-VQGAN: l2-normalized codes of low dimension).
Against collapse: k-means start, and restart of dead codes.

All processes hold the same codebook: counts and sums are added up over processes, and all random
samples are broadcast from process 0.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from vqvae.quantizers.distributed import broadcast_first, gather_rows, sum_over_processes
from vqvae.quantizers.kmeans import (
    code_statistics,
    nearest_codes,
    sample_by_error,
    spherical_kmeans,
)
from vqvae.quantizers.output import QuantizerOutput, require_sizes

# A restarted code starts with the mean count and needs time to fall below this fraction of it. With
# small batches, where the mean count is near 1, the plain threshold would restart half the codes.
LARGEST_DEAD_FRACTION_OF_MEAN = 0.1


class VectorQuantizer(nn.Module):
    """Replace each latent vector by the code with the highest cosine similarity.

    The codebook, (codebook_size, code_dim) float32 rows of length 1, is a buffer. In training mode
    each `forward` moves it once, so with gradient accumulation it moves once per micro batch.
    """

    # Of the loss that pulls latents towards their codes.
    commitment_weight = 0.25
    # Fraction of the old moving average that a training step keeps.
    ema_decay = 0.99
    # Codes are restarted when the moving average of their count, in vectors per batch of all
    # processes, falls below this (or a tenth of the mean, if less).
    dead_code_threshold = 1.0
    # The trainer sets this for the last part of a run, so that token ids keep their meaning.
    freeze_restarts = False

    codebook: Tensor
    ema_counts: Tensor
    ema_sums: Tensor
    is_initialized: Tensor

    def __init__(self, *, codebook_size: int, code_dim: int) -> None:
        super().__init__()
        require_sizes(codebook_size=codebook_size, code_dim=code_dim)
        self.codebook_size = codebook_size
        self.latent_dim = self.code_dim = code_dim
        # Random codes, which the first training batch replaces.
        codebook = F.normalize(torch.randn(codebook_size, code_dim), dim=1)
        self.register_buffer("codebook", codebook)
        self.register_buffer("ema_counts", torch.zeros(codebook_size))
        self.register_buffer("ema_sums", torch.zeros(codebook_size, code_dim))
        self.register_buffer("is_initialized", torch.tensor(False))
        self._known_initialized = False  # saves a device synchronization in every step

    def forward(
        self,
        encoder_latents: Float[Tensor, "batch latent_dim height width"],
        *,
        generator: torch.Generator | None = None,
    ) -> QuantizerOutput:
        """Quantize with a straight-through gradient and, in training mode, move the codebook.

        Only the direction of the latents counts; codes have length 1. `generator` is the source of
        the k-means start and of restarts. The loss is the weighted commitment loss; the metrics are
        "commitment_loss" (unweighted) and "dead_codes" (a count).
        """
        batch, _, height, _ = encoder_latents.shape
        with torch.autocast(encoder_latents.device.type, enabled=False):
            vectors = self._unit_vectors(encoder_latents)
            if self.training and not self._known_initialized:
                self._initialize(vectors.detach(), generator)
            ids = nearest_codes(vectors.detach(), self.codebook)
            codes = self.codebook[ids]
            commitment_loss = F.mse_loss(vectors, codes)
            if self.training:
                self._update(vectors.detach(), ids, generator)
            straight_through = vectors + (codes - vectors).detach()
        quantized = rearrange(straight_through, "(b h w) c -> b c h w", b=batch, h=height)
        return QuantizerOutput(
            quantized_latents=quantized.to(encoder_latents.dtype),
            token_ids=rearrange(ids, "(b h w) -> b h w", b=batch, h=height),
            loss=self.commitment_weight * commitment_loss,
            metrics={
                "commitment_loss": commitment_loss.detach(),
                "dead_codes": self._dead_codes().sum(),
            },
        )

    def features(
        self, encoder_latents: Float[Tensor, "batch latent_dim height width"]
    ) -> Float[Tensor, "batch code_dim height width"]:
        """Return the vectors before quantization, of length 1, with gradients."""
        return F.normalize(encoder_latents.to(self.codebook.dtype), dim=1)

    def encode(
        self, encoder_latents: Float[Tensor, "batch latent_dim height width"]
    ) -> Int[Tensor, "batch height width"]:
        """Return the token ids of encoder latents; the codebook stays, also in training mode."""
        batch, _, height, _ = encoder_latents.shape
        with torch.no_grad(), torch.autocast(encoder_latents.device.type, enabled=False):
            ids = nearest_codes(self._unit_vectors(encoder_latents), self.codebook)
        return rearrange(ids, "(b h w) -> b h w", b=batch, h=height)

    def decode(
        self, token_ids: Int[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch code_dim height width"]:
        """Return the codebook rows, of length 1, that the token ids stand for."""
        return rearrange(self.codebook[token_ids], "b h w c -> b c h w")

    def _unit_vectors(self, encoder_latents: Tensor) -> Tensor:
        rows = rearrange(encoder_latents, "b c h w -> (b h w) c")
        return F.normalize(rows.to(self.codebook.dtype), dim=1)

    def _dead_codes(self) -> Tensor:
        limit = (LARGEST_DEAD_FRACTION_OF_MEAN * self.ema_counts.mean()).clamp(
            max=self.dead_code_threshold
        )
        return self.ema_counts < limit

    @torch.no_grad()
    def _initialize(self, vectors: Tensor, generator: torch.Generator | None) -> None:
        """Start the codebook at the k-means centers of the first batch, unless it was loaded."""
        if not bool(self.is_initialized):
            finite = vectors[vectors.isfinite().all(dim=1)]
            samples = gather_rows(finite, generator=generator)
            if len(samples) == 0:
                return
            codebook, counts = spherical_kmeans(samples, self.codebook_size, generator=generator)
            # The sample may be smaller than a batch of all processes: scale the counts to one.
            vectors_per_batch = sum_over_processes(counts.new_tensor(float(len(vectors))))
            self.codebook.copy_(broadcast_first(codebook))
            self.ema_counts.copy_(broadcast_first(counts) * vectors_per_batch / len(samples))
            self.ema_sums.copy_(self.codebook * self.ema_counts[:, None])
            self.is_initialized.fill_(True)
        self._known_initialized = True

    @torch.no_grad()
    def _update(self, vectors: Tensor, ids: Tensor, generator: torch.Generator | None) -> None:
        """Move the averages by one batch (of all processes), then restart dead codes."""
        # The trainer skips the step of a batch with NaNs; it must not spoil the codebook either.
        finite = vectors.isfinite().all(dim=1, keepdim=True)
        vectors = torch.where(finite, vectors, 0.0)
        sums, counts = code_statistics(vectors, finite.float(), ids, self.codebook_size)
        statistics = sum_over_processes(torch.cat([sums, counts[:, None]], dim=1))
        sums, counts = statistics[:, :-1], statistics[:, -1]
        self.ema_counts.lerp_(counts, 1 - self.ema_decay)
        self.ema_sums.lerp_(sums, 1 - self.ema_decay)
        # Without new vectors a sum only shrinks, and would underflow: keep the code.
        moved = F.normalize(self.ema_sums, dim=1)
        self.codebook.copy_(torch.where(counts[:, None] > 0, moved, self.codebook))
        if not self.freeze_restarts:
            self._restart_dead_codes(vectors, ids, generator)

    def _restart_dead_codes(
        self, vectors: Tensor, ids: Tensor, generator: torch.Generator | None
    ) -> None:
        # One candidate for every code, dead or not: shapes do not depend on the data, and all
        # processes use up the same random numbers.
        candidates = sample_by_error(
            vectors, self.codebook[ids], self.codebook_size, generator=generator
        )
        candidates = broadcast_first(candidates)
        # A candidate of zeros stands for a vector that was not finite.
        restart = self._dead_codes() & candidates.any(dim=1)
        mean_count = self.ema_counts.mean()
        self.ema_counts.copy_(torch.where(restart, mean_count, self.ema_counts))
        self.codebook.copy_(torch.where(restart[:, None], candidates, self.codebook))
        self.ema_sums.copy_(torch.where(restart[:, None], candidates * mean_count, self.ema_sums))
