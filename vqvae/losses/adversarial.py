"""A critic of reconstructions, for training alone: PatchGAN, its losses, and where it lives.

Sources: Isola et al. 2017 (arXiv:1611.07004, patches), Lim & Ye 2017 (arXiv:1705.02894, hinge),
Wang et al. 2018 (arXiv:1711.11585, feature matching), Esser et al. 2021 (arXiv:2012.09841, the
adaptive weight).

Both players are trained by one loss in one backward pass. The tokenizer's terms see the critic's
weights as constants, the critic's term sees the reconstruction as a constant.
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
    """A PatchGAN beside the tokenizer; with both weights at 0, the default, there is none.

    Raises:
        ValueError: If a value is out of range.
    """

    weight: float = 0.0
    """Weight of the hinge loss that the tokenizer gets from the discriminator."""
    adaptive: bool = False
    """Multiply the weight by the ratio of the gradients of reconstruction and hinge loss."""
    feature_matching_weight: float = 0.0
    """Weight of the distance between the discriminator's features of image and copy."""
    starts_at: float = 0.5
    """Fraction of the budget after which it takes part."""
    channels: int = 32
    """Feature channels of its first convolution."""
    num_layers: int = 3
    """Convolutions that halve the image: 3 judge patches of 70 pixels a side, 2 of 34."""

    def __post_init__(self) -> None:
        """Refuse values that no run can use."""
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
    """What the discriminator says of images."""

    logits: Float[Tensor, "batch 1 rows columns"]
    features: list[Tensor]


class PatchDiscriminator(nn.Module):
    """Says of every patch whether it is of a true image (high) or of a copy (low).

    Deviation: normalized over each image by itself, not over the batch, so that neither copies
    nor processes nor micro-batches see each other.
    """

    def __init__(self, *, channels: int, num_layers: int) -> None:
        """Start with random weights.

        Args:
            channels: Of the first convolution; each further one has twice as many, up to 8 times.
            num_layers: Convolutions that halve the image.
        """
        super().__init__()
        widths = [channels * min(2**layer, LARGEST_WIDENING) for layer in range(num_layers + 1)]
        stages: list[nn.Module] = []
        for layer, width in enumerate(widths):
            before = widths[layer - 1] if layer else 3
            stride = 2 if layer < num_layers else 1
            parts: list[nn.Module] = [nn.Conv2d(before, width, 4, stride=stride, padding=1)]
            parts += [nn.GroupNorm(1, width)] if layer else []
            stages.append(nn.Sequential(*parts, nn.LeakyReLU(0.2)))
        self.stages = nn.ModuleList(stages)
        self.last = nn.Conv2d(widths[-1], 1, 4, padding=1)

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> PatchOutput:
        """Judge images, [-1, 1].

        Args:
            pixels: True images or copies.

        Returns:
            Unbounded logits per patch, and the features of every stage.
        """
        features = [pixels]
        for stage in self.stages:
            features.append(stage(features[-1]))
        return PatchOutput(self.last(features[-1]), features[1:])


class AdversarialVQVAE(nn.Module):
    """The tokenizer and its discriminator as one module, so that a checkpoint holds both."""

    def __init__(self, vqvae: nn.Module, discriminator: PatchDiscriminator) -> None:
        """Put them side by side.

        Args:
            vqvae: What is expected in the end; may have a ``NextFeatureVQVAE`` around it.
            discriminator: What it is trained against.
        """
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
        """Do what the tokenizer does; the losses call the discriminator themselves."""
        return self.vqvae(pixels, generator=generator, perturbation=perturbation)


class AdversarialTerms(NamedTuple):
    """Parts of the loss, without weights."""

    generator: Float[Tensor, ""]
    """For the tokenizer: the discriminator should take copies for true."""
    feature_matching: Float[Tensor, ""]
    """For the tokenizer: the discriminator's features of copies should be those of the images."""
    discriminator: Float[Tensor, ""]
    """For the discriminator."""


def adversarial_terms(
    discriminator: PatchDiscriminator,
    reconstruction: Float[Tensor, "batch 3 height width"],
    pixels: Float[Tensor, "batch 3 height width"],
) -> AdversarialTerms:
    """Let the discriminator judge copies and images.

    Args:
        discriminator: Its gradients come from the third term alone.
        reconstruction: Copies; their gradients come from the first two terms.
        pixels: True images, [-1, 1].

    Returns:
        The three terms.
    """
    constants = {name: weight.detach() for name, weight in discriminator.named_parameters()}
    seen: PatchOutput = functional_call(discriminator, constants, (reconstruction,))
    real = discriminator(pixels)
    copied = discriminator(reconstruction.detach())
    distances = [
        F.l1_loss(of_copy.float(), of_real.detach().float())
        for of_copy, of_real in zip(seen.features, real.features, strict=True)
    ]
    return AdversarialTerms(
        generator=hinge_generator_loss(seen.logits),
        feature_matching=torch.stack(distances).mean(),
        discriminator=hinge_discriminator_loss(real.logits, copied.logits),
    )


def hinge_discriminator_loss(
    real_logits: Float[Tensor, "*patches"], copied_logits: Float[Tensor, "*patches"]
) -> Float[Tensor, ""]:
    """Ask for logits above 1 on true patches and below -1 on copied ones.

    Args:
        real_logits: Of patches of images.
        copied_logits: Of patches of reconstructions.

    Returns:
        The mean of both halves; 1 if all logits are 0.
    """
    real, copied = F.relu(1 - real_logits.float()), F.relu(1 + copied_logits.float())
    return (real.mean() + copied.mean()) / 2


def hinge_generator_loss(copied_logits: Float[Tensor, "*patches"]) -> Float[Tensor, ""]:
    """Ask for high logits on copied patches, without an end."""
    return -copied_logits.float().mean()


def adaptive_weight(
    reconstruction_loss: Float[Tensor, ""],
    generator_loss: Float[Tensor, ""],
    last_layer: Tensor,
) -> Float[Tensor, ""]:
    """Find the weight at which both losses pull equally hard at the decoder's last layer.

    Args:
        reconstruction_loss: With a graph.
        generator_loss: With a graph.
        last_layer: Weights that both depend on.

    Returns:
        A constant of 0 to 10,000: the same on all processes, from the gradients of all of them.

    Source: Esser et al. 2021, equation 7.
    """
    norms = []
    for loss in (reconstruction_loss, generator_loss):
        (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
        norms.append(sum_over_processes(gradient.float().contiguous()).norm())
    return (norms[0] / (norms[1] + SMALLEST_NORM)).clamp(max=LARGEST_ADAPTIVE_WEIGHT)


def last_layer_of(vqvae: VQVAE) -> Tensor:
    """Return the weights of the decoder's last convolution."""
    return [weight for weight in vqvae.decoder.parameters() if weight.ndim > 1][-1]
