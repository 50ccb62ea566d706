"""Reconstruction losses: the mathematics behind each, on tiny images."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vqvae.logit_laplace import logit_laplace_loss, logit_laplace_pixels
from vqvae.losses.reconstruction import haar_bands, haar_wavelet_loss, ms_ssim, reconstruction_loss


def images(seed: int = 0, size: int = 32, channels: int = 3) -> Tensor:
    """Smooth random images, so that a blur does not erase them, in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = 2 * torch.rand(2, channels, size // 4, size // 4, generator=generator) - 1
    return torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), height=st.integers(1, 5), width=st.integers(1, 5))
def test_haar_transform_keeps_energy_and_can_be_undone(seed: int, height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(2, 3, 2 * height, 2 * width, generator=generator)
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
    shifted = images() + 0.3
    assert haar_wavelet_loss(shifted, images()) < 1e-6
    stripes = torch.ones(1, 1, 8, 8)
    stripes[..., 1::2, :] = -1  # all of it is the finest band along height, with size 2
    zeros = torch.zeros_like(stripes)
    torch.testing.assert_close(haar_wavelet_loss(stripes, zeros, levels=1), torch.tensor(2 / 3))
    torch.testing.assert_close(haar_wavelet_loss(stripes, zeros, levels=3), torch.tensor(2 / 3))
    halves = torch.ones(1, 1, 8, 8)
    halves[..., 4:] = -1  # only the coarsest of three levels sees this edge: 8 = 64 / sqrt(64)
    assert haar_wavelet_loss(halves, zeros, levels=2) == 0
    torch.testing.assert_close(haar_wavelet_loss(halves, zeros, levels=3), torch.tensor(8 / 3))


def test_haar_loss_refuses_sides_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="levels is 3 for images of 32 x 12 px"):
        haar_wavelet_loss(torch.zeros(1, 3, 32, 12), torch.zeros(1, 3, 32, 12))


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
    expected = [
        plain_ssim((a[0] + 1) / 2, (b[0] + 1) / 2) for a, b in zip(first, second, strict=True)
    ]
    assert min(expected) > 0.01
    torch.testing.assert_close(ms_ssim(first, second), torch.tensor(expected).mean())


@pytest.mark.parametrize("size", [7, 32, 64, 112])
def test_ms_ssim_is_1_for_equal_images_and_falls_with_noise(size: int) -> None:
    pixels = 2 * torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) - 1
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(1))
    values = [float(ms_ssim(pixels + amount * noise, pixels)) for amount in (0, 0.1, 0.3, 1)]
    assert values[0] == pytest.approx(1, abs=1e-5)
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.8


def test_ms_ssim_is_symmetric_and_gives_finite_gradients_for_opposite_images() -> None:
    pixels = images()
    torch.testing.assert_close(ms_ssim(pixels, images(1)), ms_ssim(images(1), pixels))
    opposite = (-pixels).requires_grad_()
    ms_ssim(opposite, pixels).backward()
    assert opposite.grad is not None
    assert opposite.grad.isfinite().all()
    flat = torch.ones(1, 3, 32, 32, requires_grad=True)
    ms_ssim(flat, torch.ones(1, 3, 32, 32)).backward()
    assert flat.grad is not None
    assert flat.grad.isfinite().all()


def test_ms_ssim_refuses_tiny_images() -> None:
    with pytest.raises(ValueError, match="6 px"):
        ms_ssim(torch.zeros(1, 3, 6, 9), torch.zeros(1, 3, 6, 9))


@pytest.mark.parametrize(("mean", "log_scale"), [(0.0, 0.0), (1.2, -1.5), (-2.0, 0.7)])
def test_logit_laplace_density_integrates_to_1(mean: float, log_scale: float) -> None:
    # The loss works on [0.1, 0.9]; pixels beyond [-1, 1] reach the rest of (0, 1). The integral
    # is taken over logits, where the density has no poles: dx = x (1 - x) d(logit).
    logits = torch.linspace(-60, 60, 240_001, dtype=torch.float64)
    unit = torch.sigmoid(logits)
    inside = (unit > 1e-6) & (unit < 1 - 1e-6)
    pixels = ((unit - 0.1) / 0.8 * 2 - 1)[inside].float()
    parameters = torch.tensor([mean, log_scale]).view(1, 2, 1, 1)
    density = torch.stack(
        [
            torch.exp(-logit_laplace_loss(parameters, pixel.view(1, 1, 1, 1)))
            for pixel in pixels[::20]
        ]
    )
    weights = (unit * (1 - unit))[inside][::20].float()
    step = float(logits[1] - logits[0]) * 20
    assert float((density * weights).sum() * step) == pytest.approx(1, abs=5e-3)


def test_logit_laplace_loss_by_hand() -> None:
    mean, log_scale, pixel = 0.4, -0.6, 0.5
    unit = 0.8 * (pixel + 1) / 2 + 0.1
    scale = math.exp(log_scale)
    distance = abs(math.log(unit / (1 - unit)) - mean)
    expected = math.log(2 * scale * unit * (1 - unit)) + distance / scale
    parameters = torch.tensor([mean, log_scale]).view(1, 2, 1, 1)
    loss = logit_laplace_loss(parameters, torch.full((1, 1, 1, 1), pixel))
    assert float(loss) == pytest.approx(expected, abs=0.03)  # the bend of ln b shifts it a little


def test_logit_laplace_loss_is_least_at_the_pixels_and_bounded() -> None:
    pixels = images()
    unit = 0.8 * (pixels + 1) / 2 + 0.1
    means = torch.logit(unit)
    exact = torch.cat([means, torch.full_like(means, -1.0)], dim=1)
    torch.testing.assert_close(logit_laplace_pixels(exact), pixels)
    wrong = torch.cat([means + 0.1, torch.full_like(means, -1.0)], dim=1)
    assert logit_laplace_loss(exact, pixels) < logit_laplace_loss(wrong, pixels)
    overconfident = torch.cat([means, torch.full_like(means, -1e4)], dim=1).requires_grad_()
    loss = logit_laplace_loss(overconfident, pixels)
    loss.backward()
    assert loss > -7
    assert overconfident.grad is not None
    assert overconfident.grad.isfinite().all()


def test_logit_laplace_needs_two_parameters_for_each_channel() -> None:
    with pytest.raises(ValueError, match=r"expected \(2, 6, 32, 32\)"):
        logit_laplace_loss(torch.zeros(2, 3, 32, 32), images())


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


def test_reconstruction_loss_refuses_to_broadcast() -> None:
    # A TypeError where the test run lets jaxtyping check shapes at the door.
    with pytest.raises((ValueError, TypeError), match="reconstruction"):
        reconstruction_loss(torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 8, 8))


def test_reconstruction_loss_is_computed_in_float32_under_autocast() -> None:
    first, second = images(0), images(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = reconstruction_loss(first, second, ms_ssim_weight=1.0)
    torch.testing.assert_close(loss, reconstruction_loss(first, second, ms_ssim_weight=1.0))
