"""The checked input and the output of one pipeline call."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from dalle_mini_impl.errors import UserError
from dalle_mini_impl.sampling.rerank import ImageRanker
from dalle_mini_impl.sampling.sampler import SamplingConfig

Rank = ImageRanker | Literal["likelihood", "none"]
MAX_SEED = 2**63 - 1
MAX_PROMPT_LENGTH = 100_000  # characters; they are kept in every image's file


@dataclass(frozen=True)
class PipelineOutput:
    """Images of one call, prompt by prompt."""

    images: list[Image.Image]
    prompts: list[str]
    """The prompt of each image."""
    seeds: list[int]
    """The seed of each image; with the same prompt, sampling config and ``num_candidates=1`` it
    reproduces the image."""
    scores: list[float]
    """log p(image | prompt) - log p(image) of each image in nats; 0 where it was not needed. The
    scores of the call's ranker, if it had one."""


@dataclass(frozen=True)
class Inpainting:
    """An image, and which part of it is inpainted: exactly one of the last three is given."""

    image: Image.Image
    mask: Image.Image | None = None
    """As large as the image, white where it is inpainted."""
    keep_rows: int | None = None
    """Rows of image tokens at the top that stay."""
    keep_fraction: float | None = None
    """Fraction of the image tokens that stay, in (0, 1); each seed keeps others."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """The input of one call, already checked; ``TextToImagePipeline.check`` makes it."""

    prompts: list[str]
    num_images: int
    """Per prompt."""
    num_candidates: int
    """Generated for each image that is kept."""
    seed: int
    """Image k of each prompt is the best of ``num_candidates`` seeds from
    ``seed + k * num_candidates`` on."""
    sampling_config: SamplingConfig
    rank: Rank = "likelihood"
    """Which candidate is kept: that of the largest log-likelihood ratio, the first, or the one that
    this object scores highest."""
    inpainting: Inpainting | None = None

    @property
    def candidates_per_image(self) -> int:
        """Candidates that are generated: where the first one is kept, the others need not be."""
        return 1 if self.rank == "none" else self.num_candidates

    def seeds(self) -> Int[Tensor, " candidates"]:
        """Return the seed of each candidate of a prompt."""
        end = self.seed + self.num_images * self.num_candidates
        step = self.num_candidates // self.candidates_per_image
        return torch.arange(self.seed, end, step)

    def batches(self, max_images: int) -> Iterator["GenerationRequest"]:
        """Split into requests of at most ``max_images`` images, together the same ones."""
        prompts_per_batch = max(max_images // self.num_images, 1)
        for start in range(0, len(self.prompts), prompts_per_batch):
            prompts = self.prompts[start : start + prompts_per_batch]
            for offset in range(0, self.num_images, max_images):
                yield dataclasses.replace(
                    self,
                    prompts=prompts,
                    num_images=min(self.num_images - offset, max_images),
                    seed=self.seed + offset * self.num_candidates,
                )


def check_prompts(prompts: list[Any]) -> None:
    """Refuse prompts that are empty, too long or no valid Unicode.

    Raises:
        UserError: If one is, or there is none.
    """
    if not prompts:
        raise UserError("prompt: got none, expected some text")
    for text in prompts:
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"prompt: got {str(text)[:20]!r}, expected some text")
        if len(text) > MAX_PROMPT_LENGTH:
            raise UserError(
                f"prompt: got {len(text)} characters, expected at most {MAX_PROMPT_LENGTH}"
            )
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair
            raise UserError(f"prompt: got {text[:20]!a}, expected valid Unicode text") from None


def check_counts(*, num_images: int, num_candidates: int, seed: int) -> None:
    """Refuse counts below 1, and seeds that the noise cannot take.

    Raises:
        UserError: If a number is no whole one or out of range.
    """
    for name, count in (("num_images", num_images), ("num_candidates", num_candidates)):
        if not _is_whole(count):
            raise UserError(f"{name}: got {count!r}, expected a whole number")
        if count < 1:
            raise UserError(f"{name}: got {count}, expected at least 1")
    # The last candidate's seed must fit in an int64, too.
    per_prompt = num_images * num_candidates
    if not _is_whole(seed) or not 0 <= seed <= MAX_SEED - per_prompt:
        raise UserError(f"seed: got {seed!r}, expected 0 to 2 ** 63 - {1 + per_prompt}")


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
