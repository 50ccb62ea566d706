"""How the next token of every image is chosen from the logits: settings, guidance, noise."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle_mini_impl.models.dalle_config import PAD_TOKEN_ID, DalleConfig
from dalle_mini_impl.sampling.guidance import GuidanceSchedule, guide, scale_at
from dalle_mini_impl.sampling.logits import gumbel_noise, keep_top_k, keep_top_p


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are generated.

    Raises:
        ValueError: If a value is out of range.
    """

    guidance_scale: float = 3.0
    """Strength of classifier-free guidance; 1.0 is off."""
    guidance_schedule: GuidanceSchedule = "cosine"
    """The same guidance for every token, or rising along the image."""
    temperature: float = 1.0
    """Divides the guided logits; below 1 plays safe."""
    top_k: int = 0
    """Sample among this many likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that hold this probability mass."""

    def __post_init__(self) -> None:
        """Refuse values that define no distribution."""
        if not 0 <= self.guidance_scale < math.inf:
            raise ValueError(f"guidance_scale: got {self.guidance_scale}, expected a number from 0")
        if self.guidance_schedule not in get_args(GuidanceSchedule):
            raise ValueError(
                f"guidance_schedule: got {self.guidance_schedule!r}, "
                f"expected one of {', '.join(get_args(GuidanceSchedule))}"
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature: got {self.temperature}, expected a number above 0")
        if self.top_k < 0:
            raise ValueError(f"top_k: got {self.top_k}, expected a count, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: got {self.top_p}, expected above 0 and up to 1")


class Sampler:
    """The images of one batch so far, and the rule for their next token.

    Steps are tensors, so that one recording of a step serves all of them.
    """

    def __init__(
        self,
        config: DalleConfig,
        *,
        seeds: Int[Tensor, " batch"],
        sampling_config: SamplingConfig,
        noise: Callable[..., Tensor] = gumbel_noise,
    ) -> None:
        """Start with empty images.

        Args:
            config: Of the decoder.
            seeds: One per image; everything here lives on their device.
            sampling_config: Guidance and filters.
            noise: ``gumbel_noise``, or the same numbers made faster.
        """
        self.seeds, self.sampling_config, self.noise = seeds, sampling_config, noise
        self.num_steps, self.codebook_size = config.image_length, config.codebook_size
        self.is_guided = sampling_config.guidance_scale != 1.0
        self.tokens = torch.zeros(len(seeds), self.num_steps, dtype=torch.long, device=seeds.device)
        self.log_likelihood_ratio = torch.zeros(len(seeds), device=seeds.device)
        scales = [
            scale_at(
                step,
                self.num_steps,
                guidance_scale=sampling_config.guidance_scale,
                schedule=sampling_config.guidance_schedule,
            )
            for step in range(self.num_steps)
        ]
        self._scales = torch.tensor(scales, device=seeds.device)

    def caption_rows(
        self, text_token_ids: Int[Tensor, "batch text_length"]
    ) -> Int[Tensor, "rows text_length"]:
        """Return the captions and, with guidance, as many null captions after them."""
        if not self.is_guided:
            return text_token_ids
        return torch.cat([text_token_ids, torch.full_like(text_token_ids, PAD_TOKEN_ID)])

    def for_each_row(self, values: Int[Tensor, "batch *rest"]) -> Int[Tensor, "rows *rest"]:
        """Repeat what belongs to an image for its null row, if there is one."""
        return torch.cat([values, values]) if self.is_guided else values

    def sample_and_record(
        self, logits: Float[Tensor, "rows vocab"], step: Int[Tensor, "1"]
    ) -> None:
        """Choose one token of every image and note what the caption gained by it.

        Args:
            logits: Of the conditional rows and, with guidance, of the null rows after them.
            step: Index of the token.
        """
        steps = step.expand(len(self.seeds), 1)
        chosen, log_ratio = self.sample(logits.unsqueeze(1), steps)
        self.tokens.index_copy_(1, step, chosen)
        self.log_likelihood_ratio += log_ratio.squeeze(1)

    def sample(
        self, logits: Float[Tensor, "rows window vocab"], steps: Int[Tensor, "batch window"]
    ) -> tuple[Int[Tensor, "batch window"], Float[Tensor, "batch window"]]:
        """Say which tokens these logits choose at these steps, and note nothing.

        Args:
            logits: Of the conditional rows and, with guidance, of the null rows after them.
            steps: Index of each token.

        Returns:
            The tokens, and what the caption gained by each, in nats.
        """
        num_images, window = steps.shape
        logits = logits.float().flatten(0, 1)
        conditional, null = logits[: steps.numel()], logits[steps.numel() :]
        guided_logits, flat_steps = conditional, steps.reshape(-1, 1)
        if self.is_guided:
            scales = self._scales.index_select(0, flat_steps.squeeze(1)).unsqueeze(1)
            guided_logits = guide(conditional, null, guidance_scale=scales)
        sampling_config = self.sampling_config
        guided_logits = keep_top_k(
            guided_logits / sampling_config.temperature, sampling_config.top_k
        )
        guided_logits = keep_top_p(guided_logits, sampling_config.top_p)
        seeds = self.seeds.repeat_interleave(window)
        noise = self.noise(seeds, steps=flat_steps, vocab_size=self.codebook_size)
        chosen = (guided_logits + noise).argmax(dim=-1, keepdim=True)
        log_ratio = torch.zeros_like(chosen, dtype=torch.float32)
        if self.is_guided:
            log_ratios = conditional.log_softmax(-1) - null.log_softmax(-1)
            log_ratio = log_ratios.gather(1, chosen)
        return chosen.view(num_images, window), log_ratio.view(num_images, window)
