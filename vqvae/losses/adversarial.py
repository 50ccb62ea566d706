"""Adversarial training of the image tokenizer: PatchGAN and its losses.

Sources: Isola et al. 2017 (arXiv:1611.07004, patches), Lim & Ye 2017 (arXiv:1705.02894, hinge),
Wang et al. 2018 (arXiv:1711.11585, feature matching), Esser et al. 2021 (arXiv:2012.09841, the
adaptive weight).

Both networks are trained by one loss in one backward pass, see ``adversarial_terms``.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from vqvae.model import VQVAE, VQVAEOutput
from vqvae.perturbation import Perturbation
from vqvae.quantizers.distributed import sum_over_processes

LARGEST_ADAPTIVE_WEIGHT = 1e4
SMALLEST_NORM = 1e-6
LARGEST_WIDENING = 8


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """The PatchGAN discriminator; with both weights at 0, the default, there is none."""

    weight: float = 0.0
    """Weight of the tokenizer's hinge loss."""
    adaptive: bool = False
    """Multiply the weight by the ratio of the gradients of reconstruction and hinge loss."""
    feature_matching_weight: float = 0.0
    """Weight of the distance between the discriminator's features of image and reconstruction."""
    starts_at: float = 0.5
    """Fraction of the budget after which it takes part."""
    channels: int = 32
    """Feature channels of its first convolution."""
    num_layers: int = 3
    """Convolutions that halve the image: 3 judge patches of 70 pixels a side, 2 of 34."""

    def __post_init__(self) -> None:
        for name in ("weight", "feature_matching_weight"):
            self._require(name, 0 <= getattr(self, name) < float("inf"), "at least 0")
        self._require("starts_at", 0 <= self.starts_at < 1, "0 to below 1")
        for name in ("channels", "num_layers"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("adaptive", not self.adaptive or self.weight > 0, "false without a weight")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(
                f"discriminator.{name}: got {getattr(self, name)}, expected {expected}"
            )

    @property
    def is_on(self) -> bool:
        """Whether there is a discriminator at all."""
        return self.weight > 0 or self.feature_matching_weight > 0

    @property
    def smallest_side(self) -> int:
        """Side in pixels of the smallest image that has a patch."""
        return 3 * 2**self.num_layers


class PatchOutput(NamedTuple):
    """Unbounded logits per patch, and the features of every stage."""

    logits: Float[Tensor, "batch 1 rows columns"]
    features: list[Tensor]


class PatchDiscriminator(nn.Module):
    """Predicts for every patch whether it is real (high) or fake, a reconstruction (low).

    The first convolution has ``channels``, each of the ``num_layers`` further ones twice as many as
    the one before, up to 8 times.
    """

    def __init__(self, *, channels: int, num_layers: int) -> None:
        super().__init__()
        widths = [channels * min(2**layer, LARGEST_WIDENING) for layer in range(num_layers + 1)]
        stages: list[nn.Module] = []
        for layer, width in enumerate(widths):
            before = widths[layer - 1] if layer else 3
            stride = 2 if layer < num_layers else 1
            parts: list[nn.Module] = [nn.Conv2d(before, width, 4, stride=stride, padding=1)]
            # Deviation: normalized over each image alone, not over the batch, so that the result
            # depends neither on the other images nor on micro-batches and processes.
            parts += [nn.GroupNorm(1, width)] if layer else []
            stages.append(nn.Sequential(*parts, nn.LeakyReLU(0.2)))
        self.stages = nn.ModuleList(stages)
        self.last = nn.Conv2d(widths[-1], 1, 4, padding=1)

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> PatchOutput:
        """Classify the patches of images in [-1, 1]."""
        features = [pixels]
        for stage in self.stages:
            features.append(stage(features[-1]))
        return PatchOutput(self.last(features[-1]), features[1:])


class AdversarialVQVAE(nn.Module):
    """The tokenizer and its discriminator as one module, so that a checkpoint holds both."""

    def __init__(self, vqvae: nn.Module, discriminator: PatchDiscriminator) -> None:
        super().__init__()
        self.vqvae = vqvae
        self.discriminator = discriminator

    def forward(
        self,
        pixels: Float[Tensor, "batch 3 image_height image_width"],
        *,
        generator: torch.Generator | None = None,
        perturbation: Perturbation | None = None,
    ) -> VQVAEOutput:
        """Call the tokenizer; ``adversarial_terms`` calls the discriminator."""
        return self.vqvae(pixels, generator=generator, perturbation=perturbation)


class AdversarialTerms(NamedTuple):
    """Parts of the loss, without weights: two for the tokenizer, the last for the discriminator."""

    generator: Float[Tensor, ""]  # hinge loss of the reconstructions
    feature_matching: Float[Tensor, ""]  # L1 distance of the features of real and fake
    discriminator: Float[Tensor, ""]


def adversarial_terms(
    discriminator: PatchDiscriminator,
    reconstruction: Float[Tensor, "batch 3 height width"],
    pixels: Float[Tensor, "batch 3 height width"],
) -> AdversarialTerms:
    """Return the three terms for images and reconstructions in [-1, 1].

    The gradients of the reconstruction come from the first two terms, those of the discriminator
    from the third alone.
    """
    # 1. for the tokenizer: gradients flow through the discriminator, not into its weights
    constants = {name: weight.detach() for name, weight in discriminator.named_parameters()}
    fake: PatchOutput = functional_call(discriminator, constants, (reconstruction,))
    # 2. for the discriminator: the reconstruction is a constant
    real = discriminator(pixels)
    detached_fake = discriminator(reconstruction.detach())
    distances = [
        F.l1_loss(fake_features.float(), real_features.detach().float())
        for fake_features, real_features in zip(fake.features, real.features, strict=True)
    ]
    return AdversarialTerms(
        generator=hinge_generator_loss(fake.logits),
        feature_matching=torch.stack(distances).mean(),
        discriminator=hinge_discriminator_loss(real.logits, detached_fake.logits),
    )


def hinge_discriminator_loss(
    real_logits: Float[Tensor, "*patches"], fake_logits: Float[Tensor, "*patches"]
) -> Float[Tensor, ""]:
    """Penalize logits below 1 on real patches and above -1 on fake ones; 1 if all logits are 0."""
    real, fake = F.relu(1 - real_logits.float()), F.relu(1 + fake_logits.float())
    return (real.mean() + fake.mean()) / 2


def hinge_generator_loss(fake_logits: Float[Tensor, "*patches"]) -> Float[Tensor, ""]:
    """Reward high logits on fake patches, without a bound."""
    return -fake_logits.float().mean()


def adaptive_weight(
    reconstruction_loss: Float[Tensor, ""],
    generator_loss: Float[Tensor, ""],
    last_layer: Tensor,
) -> Float[Tensor, ""]:
    """Return the ratio of the gradient norms of both losses at the decoder's last layer.

    A constant in [0, 10,000], equal on all processes (Esser et al. 2021, equation 7).
    """
    norms = []
    for loss in (reconstruction_loss, generator_loss):
        (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
        # The norm of the summed gradient, as of one process with the whole batch.
        norms.append(sum_over_processes(gradient.float().contiguous()).norm())
    return (norms[0] / (norms[1] + SMALLEST_NORM)).clamp(max=LARGEST_ADAPTIVE_WEIGHT)


def last_layer_of(model: nn.Module) -> Tensor:
    """Return the weights of the last convolution of a tokenizer, or of the one inside a model."""
    vqvae = next(module for module in model.modules() if isinstance(module, VQVAE))
    return [weight for weight in vqvae.decoder.parameters() if weight.ndim > 1][-1]
