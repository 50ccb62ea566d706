"""The output of every quantizer."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor


class QuantizerOutput(NamedTuple):
    """The quantization of one batch of encoder latents."""

    # The decoder's input; its gradient reaches the encoder.
    quantized_latents: Float[Tensor, "batch code_dim height width"]
    token_ids: Int[Tensor, "batch height width"]  # in [0, codebook_size)
    loss: Float[Tensor, ""]  # to be added to the reconstruction loss, weighted; 0 for FSQ
    metrics: dict[str, Tensor]  # detached scalars to log


def require_sizes(*, codebook_size: int, code_dim: int) -> None:
    """Refuse an empty codebook or codes of length 0."""
    for name, size in (("codebook_size", codebook_size), ("code_dim", code_dim)):
        if size < 1:
            raise ValueError(f"{name}: got {size}, expected at least 1")
