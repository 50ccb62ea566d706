"""How well the image tokenizer reconstructs held-out images, and how it uses its codes."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from dalle_mini_impl.data.image_grid import make_grid
from dalle_mini_impl.data.images import bytes_to_pixels
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.evaluation.bootstrap import bootstrap_mean
from dalle_mini_impl.evaluation.report import Section, Table, number, render_heatmap
from dalle_mini_impl.evaluation.samples import Pixels, Samples, decode, to_images
from vqvae.image_tokenizer import ImageTokenizer
from vqvae.metrics import codebook_perplexity, codebook_usage, psnr, token_counts

NUM_WORST = 16
SSIM_WINDOW = 11  # pixels; of Wang et al. 2004
TEXT = (
    "Held-out images and their reconstructions from tokens. SSIM is that of Wang et al. 2004. "
    "Entropies come from counts, which makes them too small for few images. "
    "`position_entropy.png`: black is 0 bits, white the maximum for this number of images."
)


def measure_reconstruction(vqvae: ImageTokenizer, held_out: Samples) -> Section:
    """Measure PSNR, SSIM, codebook usage and entropy per position on held-out images."""
    reconstructions = decode(vqvae, held_out.image_token_ids)
    reference, reconstructed = bytes_to_pixels(held_out.pixels), bytes_to_pixels(reconstructions)
    # Per image: the mean of PSNRs is not the PSNR of the mean error.
    decibels = np.array(
        [float(psnr(reconstructed[i : i + 1], reference[i : i + 1])) for i in range(len(held_out))]
    )
    # Codes that only training images use do not count.
    counts = token_counts(held_out.image_token_ids, vqvae.codebook_size)
    entropy = position_entropy(held_out.image_token_ids).reshape(vqvae.image_grid_size)
    figures = {
        "num_images": len(held_out),
        "num_tokens": int(counts.sum()),
        "psnr_db": bootstrap_mean(decibels),
        "ssim": bootstrap_mean(ssim(reconstructions, held_out.pixels)),
        "codebook_size": vqvae.codebook_size,
        "codebook_usage": float(codebook_usage(counts)),
        "codebook_perplexity": float(codebook_perplexity(counts)),
        "position_entropy_bits": {
            "mean": float(entropy.mean()),
            "by_cell": [[float(value) for value in row] for row in entropy],
        },
    }
    # Images and codes both bound an entropy; + 1 keeps the bound of a single image above 0.
    highest = math.log2(min(len(held_out), vqvae.codebook_size) + 1)
    sheets = {
        "worst_reconstructions": _worst_reconstructions(held_out, reconstructions, decibels),
        "position_entropy": render_heatmap(entropy, low=0.0, high=highest),
    }
    return Section("Tokenizer", TEXT, figures, [_table(figures, entropy)], sheets)


def ssim(left: Pixels, right: Pixels) -> np.ndarray:
    """Measure the structural similarity of pairs of images: at most 1, the mean over colors.

    Raises:
        UserError: If scikit-image is not installed, or images are too small.

    Source: Wang et al. 2004, with their Gaussian window, by scikit-image.
    """
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        raise UserError(
            "scikit-image: not installed, expected by evaluate.py: pip install -e '.[eval]'"
        ) from None
    if (side := min(left.shape[2:])) < SSIM_WINDOW:
        raise UserError(f"image_size: got {side}, expected at least {SSIM_WINDOW} pixels for SSIM")
    # sigma and the biased covariance make scikit-image's SSIM that of the paper
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    values = [
        structural_similarity(a.numpy(), b.numpy(), channel_axis=0, data_range=255, **options)
        for a, b in zip(left, right, strict=True)
    ]
    return np.asarray(values)


def position_entropy(
    image_token_ids: Int[Tensor, "samples image_length"],
) -> Float[Tensor, " image_length"]:
    """Estimate the entropy in bits of the token in each grid cell.

    Counts give at most log2(samples), and too little for few samples.
    """
    entropies = []
    for column in image_token_ids.T:
        fractions = torch.bincount(column).double() / len(column)
        entropies.append(torch.special.entr(fractions).sum() / math.log(2))
    return torch.stack(entropies).float()


def _table(figures: Mapping[str, Any], entropy: Float[Tensor, "rows columns"]) -> Table:
    rows = [
        ("images, tokens", f"{figures['num_images']}, {figures['num_tokens']}"),
        ("PSNR in dB", number(figures["psnr_db"], 2)),
        ("SSIM", number(figures["ssim"])),
        ("codebook usage", f"{figures['codebook_usage']:.1%} of {figures['codebook_size']}"),
        ("codebook perplexity", f"{figures['codebook_perplexity']:.0f}"),
        (
            "entropy of a position's token in bits: mean, minimum, maximum",
            f"{entropy.mean():.2f}, {entropy.min():.2f}, {entropy.max():.2f}",
        ),
    ]
    return Table("tokenizer", ("figure", "value"), rows)


def _worst_reconstructions(
    held_out: Samples, reconstructions: Pixels, decibels: np.ndarray
) -> Image.Image:
    # A stable sort: images of the same PSNR come in the same order in every report.
    images, captions = [], []
    for index in np.argsort(decibels, kind="stable")[:NUM_WORST].tolist():
        images += to_images(torch.stack([held_out.pixels[index], reconstructions[index]]))
        captions += [held_out.captions[index], f"reconstructed, {decibels[index]:.1f} dB"]
    return make_grid(images, columns=8, captions=captions)
