"""The interface between the trainer and a model in training."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn


@dataclass(frozen=True)
class ImageGrid:
    """Images that a task wants to be seen."""

    key: str
    images: list[Image.Image]
    captions: list[str]


@runtime_checkable  # for the checks of types in the tests
class Task(Protocol):
    """What the loop needs of a model's training: data, a loss, and things to look at."""

    num_samples: int
    """Training samples."""
    num_uniforms: int
    """Uniform random numbers that one sample of a batch uses."""
    tokens_per_sample: int
    """Tokens that one sample makes; the loop reports tokens per second."""
    identity: str
    """What the model's tokens mean: a checkpoint of another identity is of no use."""
    sample_weights: Tensor | None
    """How often each sample is expected relative to the others, or None for equal shares."""

    def make_batch(
        self, sample_ids: Int[Tensor, " batch"], uniforms: Float[Tensor, "batch num_uniforms"]
    ) -> dict[str, Tensor]:
        """Collect the samples on the CPU; ``uniforms`` are uniform in [0, 1)."""
        ...

    def loss(
        self,
        model: nn.Module,
        batch: dict[str, Tensor],
        *,
        progress: float,
        generator: torch.Generator,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, a mean over samples, and detached metrics."""
        ...

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Measure the model on held-out samples."""
        ...

    def make_image_grids(self, model: nn.Module) -> list[ImageGrid]:
        """Make the images that show how far the model is."""
        ...
