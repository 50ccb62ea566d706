"""Drawing image tokens from a decoder, with a key-value cache and batched guidance.

A picture depends on its prompt, its seed and the settings alone. Its noise comes from its seed,
and every batch is padded to the same number of rows, because matrix products of different shapes
round differently and a last-digit difference can tip a token.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle_mini_impl.models.dalle import PAD_TOKEN_ID, Dalle
from dalle_mini_impl.sampling.guidance import GuidanceSchedule, guide, scale_at
from dalle_mini_impl.sampling.logits import gumbel_noise, keep_top_k, keep_top_p

ROWS_PER_BATCH = 16  # pictures drawn together


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are drawn.

    Raises:
        ValueError: If a value is out of range.
    """

    guidance_scale: float = 3.0
    """Strength of classifier-free guidance; 1.0 is off."""
    guidance_schedule: GuidanceSchedule = "cosine"
    """The same guidance for every token, or rising along the picture."""
    temperature: float = 1.0
    """Divides the guided logits; below 1 plays safe."""
    top_k: int = 0
    """Draw among this many likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that hold this probability mass."""

    def __post_init__(self) -> None:
        """Refuse values that define no distribution."""
        if not 0 <= self.guidance_scale < math.inf:
            raise ValueError(f"guidance_scale: got {self.guidance_scale}, wanted a number from 0")
        if self.guidance_schedule not in get_args(GuidanceSchedule):
            raise ValueError(
                f"guidance_schedule: got {self.guidance_schedule!r}, "
                f"wanted one of {', '.join(get_args(GuidanceSchedule))}"
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature: got {self.temperature}, wanted a number above 0")
        if self.top_k < 0:
            raise ValueError(f"top_k: got {self.top_k}, wanted a count, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: got {self.top_p}, wanted above 0 and up to 1")


class DrawnTokens(NamedTuple):
    """Image tokens, and how much more likely the caption makes them."""

    image_token_ids: Int[Tensor, "batch image_length"]
    caption_gain: Float[Tensor, " batch"]
    """log p(image | caption) - log p(image) in nats; zeros when guidance is off."""


@torch.inference_mode()
def generate_image_token_ids(
    model: Dalle,
    text_token_ids: Int[Tensor, "batch text_length"],
    *,
    seeds: Int[Tensor, " batch"],
    settings: SamplingConfig,
) -> DrawnTokens:
    """Draw one picture's tokens for every caption.

    Args:
        model: In evaluation mode.
        text_token_ids: Captions, padded; the batch may have any size.
        seeds: One per picture, in [0, 2 ** 63).
        settings: Guidance and filters.

    Returns:
        Tokens in raster order, and the caption's gain.

    Raises:
        ValueError: If there is not one seed per caption.
    """
    if len(seeds) != len(text_token_ids):
        raise ValueError(f"seeds: got {len(seeds)}, wanted one per caption, {len(text_token_ids)}")
    drawn = []
    for start in range(0, max(len(seeds), 1), ROWS_PER_BATCH):
        text, some_seeds = text_token_ids[start:][:ROWS_PER_BATCH], seeds[start:][:ROWS_PER_BATCH]
        missing = ROWS_PER_BATCH - len(text)
        text = torch.nn.functional.pad(text, (0, 0, 0, missing), value=PAD_TOKEN_ID)
        some_seeds = torch.nn.functional.pad(some_seeds, (0, missing))
        full = _draw_batch(model, text, some_seeds, settings)
        drawn.append(DrawnTokens(*(rows[: ROWS_PER_BATCH - missing] for rows in full)))
    return DrawnTokens(*(torch.cat(parts) for parts in zip(*drawn, strict=True)))


def _draw_batch(
    model: Dalle, text_token_ids: Tensor, seeds: Tensor, settings: SamplingConfig
) -> DrawnTokens:
    """Draw one padded batch; conditional rows come first, null rows after them."""
    config, device = model.config, text_token_ids.device
    num_steps, batch_size = config.image_length, len(text_token_ids)
    guided = settings.guidance_scale != 1.0
    if guided:
        null = torch.full_like(text_token_ids, PAD_TOKEN_ID)
        text_token_ids = torch.cat([text_token_ids, null])
    noise = gumbel_noise(seeds, num_steps=num_steps, vocab_size=config.codebook_size).to(device)
    cache = model.new_cache(len(text_token_ids))
    logits = model.prefill(text_token_ids, cache)
    tokens = torch.empty(batch_size, num_steps, dtype=torch.long, device=device)
    gain = torch.zeros(batch_size, device=device)
    for step in range(num_steps):
        scale = scale_at(
            step,
            num_steps,
            guidance_scale=settings.guidance_scale,
            schedule=settings.guidance_schedule,
        )
        logits = logits.float()
        conditional, null_logits = logits[:batch_size], logits[batch_size:]
        guided_logits = (
            guide(conditional, null_logits, guidance_scale=scale) if guided else conditional
        )
        filtered = keep_top_p(
            keep_top_k(guided_logits / settings.temperature, settings.top_k), settings.top_p
        )
        token = (filtered + noise[step]).argmax(dim=-1)
        tokens[:, step] = token
        if guided:
            chosen = token.unsqueeze(1)
            gain += (
                conditional.log_softmax(-1).gather(1, chosen)
                - null_logits.log_softmax(-1).gather(1, chosen)
            ).squeeze(1)
        if step + 1 < num_steps:
            both = torch.cat([token, token]) if guided else token
            logits = model.decode_one(both, cache, cell=step, next_cell=step + 1)
    return DrawnTokens(tokens, gain)
