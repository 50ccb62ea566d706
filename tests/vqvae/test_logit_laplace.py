"""The logit-Laplace likelihood: a density, by hand, and bounded."""

import math

import pytest
import torch

from tests.reference.random_weights import random_pixels
from vqvae.logit_laplace import logit_laplace_loss, logit_laplace_pixels


@pytest.mark.parametrize(("mean", "log_scale"), [(0.0, 0.0), (1.2, -1.5), (-2.0, 0.7)])
def test_density_integrates_to_1(mean: float, log_scale: float) -> None:
    # The loss works on [0.1, 0.9]; pixels beyond [-1, 1] reach the rest of (0, 1). The integral
    # is taken over logits, where the density has no poles: dx = x (1 - x) d(logit).
    logits = torch.linspace(-60, 60, 240_001, dtype=torch.float64)
    unit = torch.sigmoid(logits)
    inside = (unit > 1e-6) & (unit < 1 - 1e-6)
    pixels = ((unit - 0.1) / 0.8 * 2 - 1)[inside].float()
    parameters = torch.tensor([mean, log_scale]).view(1, 2, 1, 1)
    nats = [logit_laplace_loss(parameters, each.view(1, 1, 1, 1)) for each in pixels[::20]]
    density = torch.exp(-torch.stack(nats))
    weights = (unit * (1 - unit))[inside][::20].float()
    step = float(logits[1] - logits[0]) * 20
    assert float((density * weights).sum() * step) == pytest.approx(1, abs=5e-3)


def test_loss_by_hand() -> None:
    mean, log_scale, pixel = 0.4, -0.6, 0.5
    unit, scale = 0.8 * (pixel + 1) / 2 + 0.1, math.exp(log_scale)
    distance = abs(math.log(unit / (1 - unit)) - mean)
    expected = math.log(2 * scale * unit * (1 - unit)) + distance / scale
    parameters = torch.tensor([mean, log_scale]).view(1, 2, 1, 1)
    loss = logit_laplace_loss(parameters, torch.full((1, 1, 1, 1), pixel))
    assert float(loss) == pytest.approx(expected, abs=0.03)  # the bend of ln b shifts it a little


def test_loss_is_least_at_the_pixels_and_bounded() -> None:
    pixels = random_pixels(2, 32)
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


def test_two_parameters_for_each_channel_are_required() -> None:
    with pytest.raises(ValueError, match=r"expected \(2, 6, 32, 32\)"):
        logit_laplace_loss(torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 32, 32))
