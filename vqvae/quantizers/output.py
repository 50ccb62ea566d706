"""The output of every quantizer."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor


class QuantizerOutput(NamedTuple):
    """The quantization of one batch of encoder latents."""

    quantized_latents: Float[Tensor, "batch code_dim height width"]
    """The decoder's input; its gradient reaches the encoder."""
    token_ids: Int[Tensor, "batch height width"]
    """The discrete code of every grid cell, in [0, codebook_size)."""
    loss: Float[Tensor, ""]
    """To be added to the reconstruction loss, already weighted; 0 for FSQ."""
    metrics: dict[str, Tensor]
    """Detached scalars to log."""


def require_sizes(*, codebook_size: int, code_dim: int) -> None:
    """Refuse an empty codebook or codes of length 0."""
    for name, size in (("codebook_size", codebook_size), ("code_dim", code_dim)):
        if size < 1:
            raise ValueError(f"{name}: got {size}, expected at least 1")
