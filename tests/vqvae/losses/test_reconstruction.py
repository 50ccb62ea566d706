"""Reconstruction losses on tiny images, against plain re-implementations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.reference.random_weights import noise, random_pixels
from vqvae.losses.reconstruction import haar_bands, haar_wavelet_loss, ms_ssim, reconstruction_loss


def images(seed: int = 0, size: int = 32, channels: int = 3) -> Tensor:
    """Smooth random images, so that a blur does not erase them, in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = 2 * torch.rand(2, channels, size // 4, size // 4, generator=generator) - 1
    return torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), height=st.integers(1, 5), width=st.integers(1, 5))
def test_haar_transform_is_orthonormal_and_invertible(seed: int, height: int, width: int) -> None:
    source = noise(2, 3, 2 * height, 2 * width, seed=seed)
    low, by_height, by_width, by_both = haar_bands(source)
    energy = sum(band.square().sum() for band in (low, by_height, by_width, by_both))
    torch.testing.assert_close(energy, source.square().sum())
    restored = torch.empty_like(source)
    restored[..., 0::2, 0::2] = (low + by_height + by_width + by_both) / 2
    restored[..., 1::2, 0::2] = (low - by_height + by_width - by_both) / 2
    restored[..., 0::2, 1::2] = (low + by_height - by_width - by_both) / 2
    restored[..., 1::2, 1::2] = (low - by_height - by_width + by_both) / 2
    torch.testing.assert_close(restored, source)


def test_haar_loss_sees_only_detail_and_sums_levels() -> None:
    assert haar_wavelet_loss(images() + 0.3, images()) < 1e-6
    stripes, halves, zeros = torch.ones(1, 1, 8, 8), torch.ones(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    stripes[..., 1::2, :] = -1  # all of it is the finest band along height, with size 2
    halves[..., 4:] = -1  # only the coarsest of three levels sees this edge: 8 = 64 / sqrt(64)
    for pattern, expected in ((stripes, 2 / 3), (halves, 8 / 3)):
        torch.testing.assert_close(haar_wavelet_loss(pattern, zeros), torch.tensor(expected))
    both = haar_wavelet_loss(stripes + halves, zeros)
    torch.testing.assert_close(both, torch.tensor(2 / 3 + 8 / 3))


def plain_ssim(first: Tensor, second: Tensor) -> float:
    """SSIM of two 2-D images in [0, 1], one 7 x 7 window after the other, in float64."""
    line = torch.exp(-((torch.arange(7).double() - 3) ** 2) / (2 * 1.5**2))
    window = torch.outer(line, line) / torch.outer(line, line).sum()
    values = []
    for y in range(first.shape[0] - 6):
        for x in range(first.shape[1] - 6):
            a, b = first[y : y + 7, x : x + 7].double(), second[y : y + 7, x : x + 7].double()
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            variance_a = (window * (a - mean_a) ** 2).sum()
            variance_b = (window * (b - mean_b) ** 2).sum()
            covariance = (window * (a - mean_a) * (b - mean_b)).sum()
            luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
            structure = (2 * covariance + 9e-4) / (variance_a + variance_b + 9e-4)
            values.append(float(luminance * structure))
    return sum(values) / len(values)


def test_ms_ssim_with_one_scale_is_ssim() -> None:
    first, second = images(0, 12, channels=1), images(1, 12, channels=1)
    first = 0.5 * first + 0.5 * second
    pairs = zip((first[:, 0] + 1) / 2, (second[:, 0] + 1) / 2, strict=True)
    expected = [plain_ssim(*pair) for pair in pairs]
    assert min(expected) > 0.01
    torch.testing.assert_close(ms_ssim(first, second), torch.tensor(expected).mean())


@pytest.mark.parametrize("size", [7, 32, 64, 112])
def test_ms_ssim_falls_from_1_with_noise(size: int) -> None:
    pixels, error = random_pixels(2, size), noise(2, 3, size, size, seed=1)
    values = [float(ms_ssim(pixels + amount * error, pixels)) for amount in (0, 0.1, 0.3, 1)]
    assert values[0] == pytest.approx(1, abs=1e-5)
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.8


def test_ms_ssim_is_symmetric_with_finite_gradients() -> None:
    pixels = images()
    torch.testing.assert_close(ms_ssim(pixels, images(1)), ms_ssim(images(1), pixels))
    flat = torch.ones(1, 3, 32, 32)
    for reconstruction, target in ((-pixels, pixels), (flat.clone(), flat)):
        reconstruction.requires_grad_()
        ms_ssim(reconstruction, target).backward()
        assert reconstruction.grad is not None
        assert reconstruction.grad.isfinite().all()


def test_reconstruction_loss_adds_its_weighted_terms() -> None:
    first, second = images(0), images(1)
    reconstructions = first.clone(), second.clone()
    l1 = (first - second).abs().mean()
    torch.testing.assert_close(reconstruction_loss(first, second, wavelet_weight=0.0), l1)
    expected = l1 + 0.5 * haar_wavelet_loss(first, second) + 0.2 * (1 - ms_ssim(first, second))
    torch.testing.assert_close(reconstruction_loss(first, second, ms_ssim_weight=0.2), expected)
    assert reconstruction_loss(first, first, ms_ssim_weight=1.0) < 1e-5
    assert torch.equal(first, reconstructions[0])
    assert torch.equal(second, reconstructions[1])


def test_wrong_sizes_are_refused() -> None:
    odd, tiny = torch.zeros(1, 3, 32, 12), torch.zeros(1, 3, 6, 9)
    with pytest.raises(ValueError, match="pixels: got 32 x 12, expected sides that are multiples"):
        haar_wavelet_loss(odd, odd)
    with pytest.raises(ValueError, match="pixels: got a side of 6"):
        ms_ssim(tiny, tiny)
    # A TypeError if jaxtyping checks the shapes first.
    with pytest.raises((ValueError, TypeError), match="reconstruction"):
        reconstruction_loss(torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 8, 8))


def test_reconstruction_loss_is_float32_under_autocast() -> None:
    first, second = images(0), images(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = reconstruction_loss(first, second, ms_ssim_weight=1.0)
    torch.testing.assert_close(loss, reconstruction_loss(first, second, ms_ssim_weight=1.0))
