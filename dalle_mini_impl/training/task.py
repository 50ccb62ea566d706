"""The interface between the trainer and a model in training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from PIL import Image
from torch import Generator, Tensor, nn


@dataclass(frozen=True)
class ImageGrid:
    """Images that show how far training is, one caption each."""

    key: str
    images: list[Image.Image]
    captions: list[str]


@runtime_checkable
class Task(Protocol):
    """A model in training: its data, its loss, its evaluation."""

    model: nn.Module
    """What is trained. The trainer moves it to its device in place."""
    num_samples: int
    """Training samples."""
    num_uniforms: int
    """Uniform random numbers per sample of a batch."""
    tokens_per_sample: int
    """For the metric tokens per second."""
    identity: str
    """Hash of what the tokens mean; a checkpoint of another identity is refused."""
    selection_metric: str | None
    """Of ``evaluate``: the latest weights with 0 or more are the best, else those with the highest.
    None: the last ones are as good as any."""
    sample_weights: Tensor | None
    """How often each sample is expected relative to the others; None for equal weights."""

    def make_batch(
        self, sample_ids: Int[Tensor, " batch"], uniforms: Float[Tensor, "batch num_uniforms"]
    ) -> dict[str, Tensor]:
        """Collect samples on the CPU, in a thread of its own; ``uniforms`` lie in [0, 1)."""
        ...

    def loss(
        self, model: nn.Module, batch: dict[str, Tensor], *, progress: float, generator: Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, a mean over samples, and detached metrics.

        ``model`` is ``self.model`` as the trainer wraps it (DDP, torch.compile): gradients are
        exchanged only if the forward pass goes through it. ``progress`` is the fraction of the run
        that is done; ``generator`` gives random numbers that belong to no sample.
        """
        ...

    def evaluate(self) -> dict[str, float]:
        """Measure the model on held-out samples."""
        ...

    def make_image_grids(self) -> list[ImageGrid]:
        """Make the images that show how far training is; none for some models."""
        ...

    def save_pretrained(self, folder: Path) -> None:
        """Write the trained model into a folder."""
        ...
