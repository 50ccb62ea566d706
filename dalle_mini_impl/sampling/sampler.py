"""Sampling the next token of every image from the logits: guidance, filters, noise."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle_mini_impl.errors import UserError
from dalle_mini_impl.models.dalle_config import PAD_TOKEN_ID, DalleConfig
from dalle_mini_impl.sampling.guidance import GuidanceSchedule, guide, scale_at
from dalle_mini_impl.sampling.logits import gumbel_noise, keep_top_k, keep_top_p


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are sampled."""

    guidance_scale: float = 3.0
    """Strength of classifier-free guidance; 1.0 is off."""
    guidance_schedule: GuidanceSchedule = "cosine"
    """The same guidance for every token, or rising along the image."""
    temperature: float = 1.0
    """Divides the guided logits; values below 1 favor likely tokens."""
    top_k: int = 0
    """Sample among this many likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Sample from the fewest likeliest tokens with this total probability; 1.0 means all."""

    def __post_init__(self) -> None:
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

    def override(self, overrides: Mapping[str, Any]) -> "SamplingConfig":
        """Replace some fields; raise UserError for an unknown one or a value out of range."""
        fields = {field.name: field for field in dataclasses.fields(self)}
        for name in sorted(overrides):
            if name not in fields:
                expected = ", ".join(sorted(fields))
                raise UserError(f"{name}: unknown setting, expected one of {expected}")
        for name, field in fields.items():
            value, kind = overrides.get(name, field.default), field.type
            if kind is float and not isinstance(value, Real):
                raise UserError(f"{name}: got {value!r}, expected a number")
            if kind is int and not isinstance(value, Integral):
                raise UserError(f"{name}: got {value!r}, expected a whole number")
        try:
            return dataclasses.replace(self, **overrides)
        except ValueError as error:
            raise UserError(str(error)) from None


class GeneratedTokens(NamedTuple):
    """Image tokens, how much more likely the caption makes them, and what they cost."""

    image_token_ids: Int[Tensor, "batch image_length"]
    log_likelihood_ratio: Float[Tensor, " batch"]
    """log p(image | caption) - log p(image) in nats; zeros when guidance is off."""
    num_passes: int
    """Forward passes of the decoder, prefill included."""


class Sampler:
    """The rule that samples the next tokens of a batch of images.

    There is one seed per image, and all tensors are on the seeds' device. ``noise`` is
    ``gumbel_noise`` or a faster function with the same values.
    """

    def __init__(
        self,
        config: DalleConfig,
        *,
        seeds: Int[Tensor, " batch"],
        sampling_config: SamplingConfig,
        noise: Callable[..., Tensor] = gumbel_noise,
    ) -> None:
        self.seeds, self.sampling_config, self.noise = seeds, sampling_config, noise
        self.num_steps, self.codebook_size = config.image_length, config.codebook_size
        self.is_guided = sampling_config.guidance_scale != 1.0
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
        """Repeat an image's values for its null row, if there is one."""
        return torch.cat([values, values]) if self.is_guided else values

    def sample(
        self, logits: Float[Tensor, "rows window vocab"], steps: Int[Tensor, "batch window"]
    ) -> tuple[Int[Tensor, "batch window"], Float[Tensor, "batch window"]]:
        """Sample the token of each step, and measure its log-likelihood ratio in nats (or zero)."""
        num_images, window = steps.shape
        flat_steps = steps.flatten()  # (batch * window)
        logits = logits.float().flatten(0, 1)  # (rows * window, vocab)
        # The rows are those of ``caption_rows``: given the captions, then given null captions.
        conditional, unconditional = logits[: steps.numel()], logits[steps.numel() :]
        guided_logits = conditional
        if self.is_guided:
            scales = self._scales.index_select(0, flat_steps).unsqueeze(1)
            guided_logits = guide(conditional, unconditional, guidance_scale=scales)
        guided_logits = guided_logits / self.sampling_config.temperature
        guided_logits = keep_top_k(guided_logits, self.sampling_config.top_k)
        guided_logits = keep_top_p(guided_logits, self.sampling_config.top_p)
        # The largest sum of logit and Gumbel noise is a sample of the softmax. The noise of a step
        # depends on seed and step alone, so that asking twice gives the same token twice: that is
        # what makes Jacobi decoding exact.
        seeds = self.seeds.repeat_interleave(window)
        noise = self.noise(seeds, steps=flat_steps.unsqueeze(1), vocab_size=self.codebook_size)
        tokens = (guided_logits + noise).argmax(dim=-1, keepdim=True)  # (batch * window, 1)
        log_ratio = torch.zeros_like(tokens, dtype=torch.float32)
        if self.is_guided:
            log_ratios = conditional.log_softmax(-1) - unconditional.log_softmax(-1)
            log_ratio = log_ratios.gather(1, tokens)
        return tokens.view(num_images, window), log_ratio.view(num_images, window)
