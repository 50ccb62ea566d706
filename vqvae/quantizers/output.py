"""What every quantizer of the discrete VAE returns."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor


class QuantizerOutput(NamedTuple):
    """The result of quantizing one batch of encoder latents.

    Attributes:
        quantized_latents: What the decoder receives; its gradient reaches the encoder.
        token_ids: The discrete code of every grid cell, in [0, codebook_size).
        loss: Scalar to add to the reconstruction loss, already weighted; 0 for FSQ.
        metrics: Detached scalars to log.
    """

    quantized_latents: Float[Tensor, "batch code_dim height width"]
    token_ids: Int[Tensor, "batch height width"]
    loss: Float[Tensor, ""]
    metrics: dict[str, Tensor]
