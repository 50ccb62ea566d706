"""Metrics of a discrete VAE: quality of the reconstruction, and use of the codebook."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

PIXEL_RANGE = 2.0
MAX_PSNR_DECIBEL = 100.0


def psnr(
    reconstruction: Float[Tensor, "batch channels height width"],
    pixels: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, ""]:
    """Return the mean over images of the peak signal-to-noise ratio, in decibel.

    The peak is 2, the range of pixels in [-1, 1]. Values of the reconstruction outside of it count
    as the nearer end, as in an image file. At most 100, the value of equal images.
    """
    require_same_shape(reconstruction, pixels)
    difference = reconstruction.float().clamp(-1, 1) - pixels.float()
    # Per image: a mean over the batch's squared errors would hide bad images behind good ones.
    mean_squares = difference.square().mean(dim=(1, 2, 3))
    decibel = 10 * torch.log10(PIXEL_RANGE**2 / mean_squares)
    return decibel.clamp(max=MAX_PSNR_DECIBEL).mean()


def hard_soft_gap(
    soft_reconstruction: Float[Tensor, "batch channels height width"],
    hard_reconstruction: Float[Tensor, "batch channels height width"],
    pixels: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, ""]:
    """Return the PSNR that a Gumbel tokenizer loses from mixtures of codes to token ids."""
    return psnr(soft_reconstruction, pixels) - psnr(hard_reconstruction, pixels)


def token_counts(
    token_ids: Int[Tensor, "*shape"], codebook_size: int
) -> Int[Tensor, " codebook_size"]:
    """Count the occurrences of each token id; counts of several batches may be added."""
    counts = torch.bincount(token_ids.flatten(), minlength=codebook_size)
    if len(counts) > codebook_size:
        raise ValueError(f"token_ids: got {len(counts) - 1}, expected ids below {codebook_size}")
    return counts


def codebook_usage(counts: Int[Tensor, " codebook_size"]) -> Float[Tensor, ""]:
    """Return the fraction, in [0, 1], of the codes that occur at all."""
    return (counts > 0).float().mean()


def codebook_perplexity(counts: Int[Tensor, " codebook_size"]) -> Float[Tensor, ""]:
    """Return how many equally frequent codes would have the same entropy: 1 to codebook_size."""
    total = int(counts.sum())
    if total == 0:
        raise ValueError("counts: got a sum of 0, expected at least one token")
    # In float64: counts may exceed the whole numbers that float32 can hold.
    return torch.special.entr(counts.double() / total).sum().exp().float()


def require_same_shape(reconstruction: Tensor, pixels: Tensor) -> None:
    """Refuse to broadcast: ``ValueError`` at two different shapes."""
    if reconstruction.shape != pixels.shape:
        raise ValueError(
            f"reconstruction: got shape {tuple(reconstruction.shape)}, "
            f"expected that of pixels, {tuple(pixels.shape)}"
        )
