"""PatchGAN: its losses against plain ones, and which network each of them trains."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.reference.random_weights import random_pixels
from vqvae import VQVAE
from vqvae.losses.adversarial import (
    DiscriminatorConfig,
    PatchDiscriminator,
    adaptive_weight,
    adversarial_terms,
    hinge_discriminator_loss,
    hinge_generator_loss,
    last_layer_of,
)

Networks = tuple[VQVAE, PatchDiscriminator, Tensor]


@pytest.fixture
def networks(build_vqvae: Callable[..., VQVAE]) -> Networks:
    torch.manual_seed(0)
    vqvae = build_vqvae().train()
    return vqvae, PatchDiscriminator(channels=4, num_layers=2), random_pixels()


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: weight.grad for name, weight in module.named_parameters()}
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


def test_hinge_losses_are_those_of_the_paper() -> None:
    real, fake = torch.tensor([2.0, 0.25, -1.0]), torch.tensor([-3.0, -0.5, 0.5])
    plain = sum(max(0.0, 1 - float(x)) for x in real) / 3
    plain += sum(max(0.0, 1 + float(x)) for x in fake) / 3
    assert float(hinge_discriminator_loss(real, fake)) == pytest.approx(plain / 2)
    assert float(hinge_generator_loss(fake)) == pytest.approx((3.0 + 0.5 - 0.5) / 3)


def test_each_network_learns_from_its_own_terms(networks: Networks) -> None:
    vqvae, discriminator, pixels = networks
    terms = adversarial_terms(discriminator, vqvae(pixels).reconstruction, pixels)
    (terms.generator + terms.feature_matching).backward(retain_graph=True)
    assert gradients(discriminator) == {}
    assert len(gradients(vqvae)) == len(list(vqvae.parameters()))
    vqvae.zero_grad()
    terms.discriminator.backward()
    assert gradients(vqvae) == {}
    assert len(gradients(discriminator)) == len(list(discriminator.parameters()))


def test_one_backward_pass_equals_two(networks: Networks) -> None:
    """The usual way freezes one network and trains the other, in turn."""
    vqvae, discriminator, pixels = networks
    reconstructions = vqvae(pixels).reconstruction
    terms = adversarial_terms(discriminator, reconstructions, pixels)
    (0.3 * terms.generator + 0.7 * terms.feature_matching + terms.discriminator).backward()
    one = [gradients(vqvae), gradients(discriminator)]
    vqvae.zero_grad()
    discriminator.zero_grad()

    discriminator.requires_grad_(False)
    reconstructions = vqvae(pixels).reconstruction
    of_fake, of_real = discriminator(reconstructions), discriminator(pixels)
    pairs = zip(of_fake.features, of_real.features, strict=True)
    distances = [(fake - real).abs().mean() for fake, real in pairs]
    (-0.3 * of_fake.logits.mean() + 0.7 * sum(distances) / len(distances)).backward()
    discriminator.requires_grad_(True)
    real, fake = discriminator(pixels).logits, discriminator(reconstructions.detach()).logits
    (((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2).backward()
    for ours, plain in zip(one, (gradients(vqvae), gradients(discriminator)), strict=True):
        torch.testing.assert_close(ours, plain)


def test_adaptive_weight_is_the_ratio_of_two_gradient_norms(networks: Networks) -> None:
    vqvae, discriminator, pixels = networks
    layer = last_layer_of(vqvae)
    assert layer is vqvae.decoder.layers[-2].weight

    def both() -> tuple[Tensor, Tensor]:
        reconstructions = vqvae(pixels).reconstruction
        generator = adversarial_terms(discriminator, reconstructions, pixels).generator
        return (reconstructions - pixels).abs().mean(), generator

    norms = []
    for index in (0, 1):
        vqvae.zero_grad()
        both()[index].backward()
        assert layer.grad is not None
        norms.append(float(layer.grad.square().sum()) ** 0.5)
    weight = adaptive_weight(*both(), layer)
    assert float(weight) == pytest.approx(norms[0] / norms[1], rel=1e-3)
    assert not weight.requires_grad
    reconstruction_loss, generator_loss = both()
    assert float(adaptive_weight(reconstruction_loss, 1e-9 * generator_loss, layer)) == 1e4


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_smallest_image_has_one_patch(num_layers: int) -> None:
    config = DiscriminatorConfig(weight=1.0, channels=2, num_layers=num_layers)
    discriminator = PatchDiscriminator(channels=2, num_layers=num_layers)
    side = config.smallest_side
    assert discriminator(torch.zeros(2, 3, side, side)).logits.shape == (2, 1, 1, 1)
    with pytest.raises(RuntimeError):
        discriminator(torch.zeros(2, 3, side - 1, side - 1))


def test_images_do_not_see_each_other() -> None:
    discriminator = PatchDiscriminator(channels=4, num_layers=2)
    pixels = torch.rand(3, 3, 16, 16)
    alone = torch.cat([discriminator(pixels[i : i + 1]).logits for i in range(3)])
    torch.testing.assert_close(discriminator(pixels).logits, alone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -0.1}, r"discriminator.weight: got -0.1, expected at least 0"),
        ({"weight": float("nan")}, r"discriminator.weight: got nan, expected at least 0"),
        ({"feature_matching_weight": float("inf")}, r"feature_matching_weight: got inf"),
        ({"starts_at": 1.0}, r"discriminator.starts_at: got 1.0, expected 0 to below 1"),
        ({"channels": 0}, r"discriminator.channels: got 0, expected at least 1"),
        ({"num_layers": 0}, r"discriminator.num_layers: got 0, expected at least 1"),
        ({"adaptive": True}, r"discriminator.adaptive: got True, expected false without a weight"),
    ],
)
def test_bad_values_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiscriminatorConfig(**options)  # type: ignore[arg-type]
    assert not DiscriminatorConfig().is_on
