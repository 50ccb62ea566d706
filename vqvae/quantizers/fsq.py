"""Finite scalar quantization: every latent channel is rounded to a few fixed levels.

Source: Mentzer et al. 2023, arXiv:2309.15505, with the bound `2 * sigmoid(1.6 x) - 1` of iFSQ,
arXiv:2601.17124, which sends a standard normal input to a nearly uniform one.
Deviation: all bins have the same width.
"""

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from vqvae.quantizers.output import QuantizerOutput

BOUND_SLOPE = 1.6


class FiniteScalarQuantizer(nn.Module):
    """Round channel i to one of `levels[i]` equally spaced values in [-1, 1].

    The codebook is the grid of all combinations. It has no parameters and no state, so it cannot
    collapse and needs no synchronization between processes. The token id is the mixed-radix number
    of the level indices; the first channel is the least significant digit.
    """

    _levels: Tensor
    _place_values: Tensor

    def __init__(self, *, levels: Sequence[int]) -> None:
        super().__init__()
        if len(levels) == 0 or min(levels) < 2:
            raise ValueError(f"levels: got {list(levels)}, expected one or more of at least 2")
        self.levels = tuple(levels)
        self.latent_dim = self.code_dim = len(levels)
        self.codebook_size = math.prod(levels)
        place_values = [math.prod(levels[:channel]) for channel in range(len(levels))]
        self.register_buffer("_levels", torch.tensor(levels), persistent=False)
        self.register_buffer("_place_values", torch.tensor(place_values), persistent=False)

    def forward(
        self,
        encoder_latents: Float[Tensor, "batch latent_dim height width"],
        *,
        generator: torch.Generator | None = None,
    ) -> QuantizerOutput:
        """Quantize unbounded latents to values in [-1, 1], with a straight-through gradient.

        The loss is 0, there are no metrics, and `generator` is not used: rounding has no noise.
        """
        scaled = self._scale(encoder_latents)
        level_indices = self._round(scaled)
        quantized = self._level_values(level_indices)
        # The value is the rounded one; the gradient passes the rounding, not the sigmoid.
        return QuantizerOutput(
            quantized_latents=(scaled + (quantized - scaled).detach()).to(encoder_latents.dtype),
            token_ids=self._to_token_ids(level_indices),
            loss=scaled.new_zeros(()),
            metrics={},
        )

    def features(
        self, encoder_latents: Float[Tensor, "batch latent_dim height width"]
    ) -> Float[Tensor, "batch code_dim height width"]:
        """Return the values before rounding, with gradients: in [-1, 1] and half a level beyond."""
        return self._scale(encoder_latents)

    def encode(
        self, encoder_latents: Float[Tensor, "batch latent_dim height width"]
    ) -> Int[Tensor, "batch height width"]:
        """Return the token ids of unbounded encoder latents."""
        return self._to_token_ids(self._round(self._scale(encoder_latents)))

    def decode(
        self, token_ids: Int[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch code_dim height width"]:
        """Return the float32 values in [-1, 1] that the token ids stand for."""
        # The digits of a mixed-radix number, the first channel the least significant.
        digits = token_ids[..., None] // self._place_values % self._levels
        return self._level_values(rearrange(digits, "b h w c -> b c h w"))

    def _scale(self, encoder_latents: Tensor) -> Tensor:
        # Each of L levels gets an interval of the same width, 2 / (L - 1). Plain rounding to points
        # from -1 to 1 leaves the two outer bins half as wide, so an even input would use them half
        # as often. With 17 levels (iFSQ) that hardly matters; with 5 or 8 it costs more evenness
        # than the bound gains.
        bounded = 2 * torch.sigmoid(BOUND_SLOPE * encoder_latents.float()) - 1
        levels = self._levels[:, None, None]
        return bounded * (levels / (levels - 1))

    def _round(self, scaled: Tensor) -> Tensor:
        highest = (self._levels - 1)[:, None, None]
        # The clamp catches only the end points, where the sigmoid is exactly 0 or 1.
        indices = torch.round((scaled + 1) / 2 * highest).long()
        return torch.minimum(indices.clamp(min=0), highest)

    def _level_values(self, level_indices: Tensor) -> Tensor:
        highest = (self._levels - 1)[:, None, None]
        return level_indices * 2 / highest - 1

    def _to_token_ids(self, level_indices: Tensor) -> Tensor:
        return (level_indices * self._place_values[:, None, None]).sum(dim=1)
