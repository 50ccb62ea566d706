"""The image tokenizer's figures, against plain sums."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from dalle_mini_impl.errors import UserError
from dalle_mini_impl.evaluation.reconstruction import measure_reconstruction, position_entropy, ssim
from dalle_mini_impl.evaluation.samples import decode, read_data
from tests.reference import tiny


def plain_ssim(left: np.ndarray, right: np.ndarray) -> float:
    """Equation 13 of Wang et al. 2004 on gray images, window by window where whole ones fit."""
    offsets = np.arange(-5, 6)
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for row in range(5, left.shape[0] - 5):
        for column in range(5, left.shape[1] - 5):
            window = np.s_[row - 5 : row + 6, column - 5 : column + 6]
            a, b = left[window], right[window]
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a = (weights * (a - mean_a) ** 2).sum()
            var_b = (weights * (b - mean_b) ** 2).sum()
            cov = (weights * (a - mean_a) * (b - mean_b)).sum()
            luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
            values.append(luminance * (2 * cov + c2) / (var_a + var_b + c2))
    return float(np.mean(values))


def test_ssim_equals_the_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randint(256, (2, 3, 20, 20), generator=generator, dtype=torch.uint8)
    noise = torch.randint(-40, 41, left.shape, generator=generator)
    right = (left.int() + noise).clamp(0, 255).to(torch.uint8)
    expected = [
        np.mean([plain_ssim(a[color], b[color]) for color in range(3)])
        for a, b in zip(left.double().numpy(), right.double().numpy(), strict=True)
    ]
    assert ssim(left, right).tolist() == pytest.approx(expected, rel=1e-6)
    assert ssim(left, left).tolist() == [1.0, 1.0]
    with pytest.raises(UserError, match="image_size: got 10, expected at least 11 pixels for SSIM"):
        ssim(left[:, :, :10, :10], right[:, :, :10, :10])


def test_position_entropy_of_known_counts() -> None:
    tokens = torch.tensor([[0, 5, 1], [1, 5, 1], [2, 5, 1], [3, 5, 2]])
    quarter = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert position_entropy(tokens).tolist() == pytest.approx([2.0, 0.0, quarter])


def test_figures_equal_plain_sums(tmp_path: Path) -> None:
    vqvae = tiny.build_vqvae()
    data = read_data(str(tiny.write_data(tmp_path / "data")), vqvae)
    held_out = data.held_out["val"]
    section = measure_reconstruction(vqvae, held_out)
    errors = (decode(vqvae, held_out.image_token_ids).double() - held_out.pixels.double()) / 255
    decibels = [-10 * math.log10(float(e.square().mean())) for e in errors]
    # The bytes of a reconstruction are rounded, by at most half of 1 / 255.
    assert section.figures["psnr_db"].value == pytest.approx(np.mean(decibels), abs=0.05)
    counts = Counter(held_out.image_token_ids.flatten().tolist())
    fractions = np.array(list(counts.values())) / held_out.image_token_ids.numel()
    assert section.figures["codebook_usage"] == pytest.approx(len(counts) / vqvae.codebook_size)
    perplexity = math.exp(-(fractions * np.log(fractions)).sum())
    assert section.figures["codebook_perplexity"] == pytest.approx(perplexity, rel=1e-5)
    assert set(section.images) == {"worst_reconstructions", "position_entropy"}
