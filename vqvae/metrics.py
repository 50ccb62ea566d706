"""Measures of a discrete VAE: how well it reconstructs and how much of the codebook it uses."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

PIXEL_RANGE = 2.0
MAX_PSNR_DECIBEL = 100.0


def psnr(
    reconstruction: Float[Tensor, "batch channels height width"],
    pixels: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, ""]:
    """Measure the peak signal-to-noise ratio: the mean of each image's own value.

    Args:
        reconstruction: Decoder output; values outside [-1, 1] count as the nearer end, as when
            the image is written to a file.
        pixels: Images, [-1, 1].

    Returns:
        Decibel with peak 2 (the range of pixels); at most 100, which equal images have.

    Raises:
        ValueError: If the shapes differ.
    """
    if reconstruction.shape != pixels.shape:
        raise ValueError(
            f"reconstruction has shape {tuple(reconstruction.shape)}; "
            f"expected that of pixels, {tuple(pixels.shape)}"
        )
    difference = reconstruction.float().clamp(-1, 1) - pixels.float()
    mean_squares = difference.square().mean(dim=(1, 2, 3))
    decibel = 10 * torch.log10(PIXEL_RANGE**2 / mean_squares)
    return decibel.clamp(max=MAX_PSNR_DECIBEL).mean()


def hard_soft_gap(
    soft_reconstruction: Float[Tensor, "batch channels height width"],
    hard_reconstruction: Float[Tensor, "batch channels height width"],
    pixels: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, ""]:
    """Measure what a relaxed (Gumbel) tokenizer loses when its mixtures become single codes.

    Args:
        soft_reconstruction: Decoded from the mixtures that training sees, [-1, 1].
        hard_reconstruction: Decoded from the token ids, [-1, 1].
        pixels: Images, [-1, 1].

    Returns:
        PSNR of the soft minus PSNR of the hard reconstruction, in decibel.
    """
    return psnr(soft_reconstruction, pixels) - psnr(hard_reconstruction, pixels)


def token_counts(
    token_ids: Int[Tensor, "*shape"], codebook_size: int
) -> Int[Tensor, " codebook_size"]:
    """Count how often each token id occurs; counts of several batches may be added.

    Args:
        token_ids: Ids in [0, codebook_size).
        codebook_size: Number of codes.

    Returns:
        int64 occurrences of each id.

    Raises:
        ValueError: If an id is out of range.
    """
    counts = torch.bincount(token_ids.flatten(), minlength=codebook_size)
    if len(counts) > codebook_size:
        raise ValueError(f"largest token id is {len(counts) - 1}; expected < {codebook_size}")
    return counts


def codebook_usage(counts: Int[Tensor, " codebook_size"]) -> Float[Tensor, ""]:
    """Measure the fraction of the codes that occur at all.

    Args:
        counts: Occurrences of each code, as from `token_counts`.

    Returns:
        A value in [0, 1].
    """
    return (counts > 0).float().mean()


def codebook_perplexity(counts: Int[Tensor, " codebook_size"]) -> Float[Tensor, ""]:
    """Find how many equally frequent codes would have the same entropy.

    Args:
        counts: Occurrences of each code, as from `token_counts`; not all 0.

    Returns:
        A value from 1 to the codebook size.

    Raises:
        ValueError: If nothing was counted.
    """
    total = int(counts.sum())
    if total == 0:
        raise ValueError("counts sum to 0; expected at least one token")
    return torch.special.entr(counts.double() / total).sum().exp().float()
