"""How well the image tokenizer keeps held-out images, and how it uses its codes."""

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle_mini_impl.data.image_grid import make_grid
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.evaluation.bootstrap import bootstrap_mean
from dalle_mini_impl.evaluation.report import Section, Table, number, render_heatmap
from dalle_mini_impl.evaluation.samples import Pixels, Samples, decode, to_floats, to_images
from vqvae.image_tokenizer import ImageTokenizer
from vqvae.metrics import codebook_perplexity, codebook_usage, psnr, token_counts

NUM_WORST = 16
SSIM_WINDOW = 11  # pixels; of Wang et al. 2004


def ssim(left: Pixels, right: Pixels) -> np.ndarray:
    """Measure the structural similarity of pairs of images.

    Args:
        left: Bytes.
        right: Bytes, one image for each of ``left``.

    Returns:
        One value per pair, at most 1; the mean over colors.

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
    if min(left.shape[2:]) < SSIM_WINDOW:
        raise UserError(f"image_size: got {left.shape[2]}, SSIM wants at least {SSIM_WINDOW}")
    values = [
        structural_similarity(
            a.numpy(), b.numpy(), channel_axis=0, data_range=255,
            gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        )
        for a, b in zip(left, right, strict=True)
    ]  # fmt: skip
    return np.asarray(values)


def position_entropy(
    image_token_ids: Int[Tensor, "samples image_length"],
) -> Float[Tensor, " image_length"]:
    """Measure how much the token of each grid cell varies from image to image.

    Args:
        image_token_ids: Of many images.

    Returns:
        Entropies in bits, from counts: at most log2(images), and too small for few images.
    """
    entropies = []
    for column in image_token_ids.T:
        fractions = torch.bincount(column).double() / len(column)
        entropies.append(torch.special.entr(fractions).sum() / math.log(2))
    return torch.stack(entropies).float()


def measure_tokenizer(vqvae: ImageTokenizer, held_out: Samples) -> Section:
    """Reconstruct held-out images.

    Args:
        vqvae: The image tokenizer.
        held_out: Images that it was not trained on, with their tokens.

    Returns:
        PSNR, SSIM, use of the codebook, entropy per position, and the worst reconstructions.
    """
    reconstructions = decode(vqvae, held_out.image_token_ids)
    reference_floats, reconstructed_floats = to_floats(held_out.pixels), to_floats(reconstructions)
    decibels = np.array([
        float(psnr(reconstructed_floats[i : i + 1], reference_floats[i : i + 1])) for i in range(len(reconstructions))
    ])  # fmt: skip
    similarity = ssim(reconstructions, held_out.pixels)
    counts = token_counts(held_out.image_token_ids, vqvae.codebook_size)
    entropy = position_entropy(held_out.image_token_ids).reshape(vqvae.image_grid_size)
    psnr_db, ssim_mean = bootstrap_mean(decibels), bootstrap_mean(similarity)
    figures = {
        "num_images": len(held_out),
        "num_tokens": int(counts.sum()),
        "psnr_db": psnr_db,
        "ssim": ssim_mean,
        "codebook_size": vqvae.codebook_size,
        "codebook_usage": float(codebook_usage(counts)),
        "codebook_perplexity": float(codebook_perplexity(counts)),
        "position_entropy_bits": {
            "mean": float(entropy.mean()),
            "by_cell": [[float(value) for value in row] for row in entropy],
        },
    }
    table = Table(
        "tokenizer",
        ("figure", "value"),
        [
            ("images, tokens", f"{len(held_out)}, {int(counts.sum())}"),
            ("PSNR in dB", number(psnr_db, 2)),
            ("SSIM", number(ssim_mean)),
            ("codes used", f"{figures['codebook_usage']:.1%} of {vqvae.codebook_size}"),
            ("codebook perplexity", f"{figures['codebook_perplexity']:.0f}"),
            (
                "entropy of a cell's token in bits: mean, least, most",
                f"{entropy.mean():.2f}, {entropy.min():.2f}, {entropy.max():.2f}",
            ),
        ],
    )
    worst = np.argsort(decibels, kind="stable")[:NUM_WORST]
    images, captions = [], []
    for index in worst.tolist():
        images += to_images(torch.stack([held_out.pixels[index], reconstructions[index]]))
        captions += [held_out.captions[index], f"reconstructed, {decibels[index]:.1f} dB"]
    return Section(
        "Tokenizer",
        "Held-out images, and what the tokenizer rebuilds from their tokens. SSIM is that of "
        "Wang et al. 2004. Entropies come from counts and are too small where images are few. "
        "`position_entropy.png`: black is 0 bits, white the most that so many images can have.",
        figures,
        [table],
        {
            "worst_reconstructions": make_grid(images, columns=8, captions=captions),
            "position_entropy": render_heatmap(
                entropy, low=0.0, high=math.log2(min(len(held_out), vqvae.codebook_size) + 1)
            ),
        },
    )
