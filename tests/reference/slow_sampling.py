"""Sampling written out slowly: guidance, filters, and whole passes without a cache."""

import math
from typing import Any

import torch
from torch import Tensor

from dalle_mini_impl.sampling.logits import gumbel_noise
from dalle_mini_impl.sampling.sampler import SamplingConfig


def captions(model: Any, count: int) -> Tensor:
    """Random captions of one token or more, padded."""
    generator = torch.Generator().manual_seed(3)
    shape = (count, model.config.text_length)
    text = torch.randint(1, model.config.vocab_size, shape, generator=generator)
    lengths = torch.randint(1, shape[1] + 1, (count, 1), generator=generator)
    return text.masked_fill(torch.arange(shape[1]) >= lengths, 0)


def slow_scale(sampling_config: SamplingConfig, step: int, num_steps: int) -> float:
    if sampling_config.guidance_schedule == "constant":
        return sampling_config.guidance_scale
    progress = 0.5 - 0.5 * math.cos(math.pi * ((step + 1) / num_steps) ** 2)
    return 1 + (sampling_config.guidance_scale - 1) * progress


def slow_allowed(logits: Tensor, sampling_config: SamplingConfig) -> list[int]:
    """Tokens that survive top-k and then top-p, found one by one from the likeliest down."""
    ranked = sorted(range(len(logits)), key=lambda token: -float(logits[token]))
    ranked = ranked[: sampling_config.top_k or None]
    probabilities = logits[ranked].softmax(-1).tolist()
    allowed: list[int] = []
    for rank, token in enumerate(ranked):
        if sum(probabilities[:rank]) < sampling_config.top_p:
            allowed.append(token)
    return allowed


@torch.inference_mode()
def slow_generate(
    model: Any,
    text: Tensor,
    seed: int,
    sampling_config: SamplingConfig,
    *,
    order: list[int] | None = None,
    known: list[int] | None = None,
) -> tuple[list[int], float]:
    """Tokens of one image in the order of ``order``, after ``known``; and the caption's ratio."""
    num_steps, vocab_size = model.config.image_length, model.config.codebook_size
    tokens, log_likelihood_ratio = list(known or []), 0.0
    cells = torch.tensor([order or list(range(num_steps))])
    image_order = cells if order else None
    for step in range(len(tokens), num_steps):
        image = torch.tensor([tokens + [0] * (num_steps - step)])
        given = model(text[None], image, image_order=image_order).image[0, step].double()
        null_text = torch.zeros_like(text)[None]
        null = model(null_text, image, image_order=image_order).image[0, step].double()
        scale = slow_scale(sampling_config, step, num_steps)
        guided = (scale * given + (1 - scale) * null) / sampling_config.temperature
        noise = gumbel_noise(torch.tensor([seed]), steps=step, vocab_size=vocab_size)[0].double()
        allowed = slow_allowed(guided, sampling_config)
        token = max(allowed, key=lambda k: float(guided[k] + noise[k]))
        tokens.append(token)
        log_likelihood_ratio += float(given.log_softmax(-1)[token] - null.log_softmax(-1)[token])
    return tokens, log_likelihood_ratio


def stepwise_logits(
    model: Any, text: Tensor, image: Tensor, *, window: int = 1, image_order: Tensor | None = None
) -> Tensor:
    """Logits of all image tokens through the cache, ``window`` tokens at a time."""
    cache = model.new_cache(len(text))
    logits = [model.prefill(text, cache, image_order=image_order).unsqueeze(1)]
    last = image.shape[1] - 1
    for start in range(0, last, window):
        tokens = image[:, start : min(start + window, last)]
        first_steps = torch.full((len(text),), start)
        options = {"first_steps": first_steps, "image_order": image_order}
        logits.append(model.decode_window(tokens, cache, **options))
    return torch.cat(logits, dim=1)
