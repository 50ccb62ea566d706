"""Generating image tokens from a decoder, with a key-value cache and batched guidance.

An image depends on its prompt, its seed and the settings alone: its noise comes from its seed.
Only rounding differs with what is generated beside it, since matrix products of other shapes add up in
another order; that tips a token only where two are equally likely to six digits.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle_mini_impl.models.text_to_image import TextToImageModel
from dalle_mini_impl.native.decoder import NativeDecoder
from dalle_mini_impl.sampling.cuda_graph import run_cuda_graph
from dalle_mini_impl.sampling.jacobi import best_window, jacobi_decode
from dalle_mini_impl.sampling.sampler import Sampler, SamplingConfig

ROWS_PER_BATCH = 16  # images generated together


class GeneratedTokens(NamedTuple):
    """Image tokens, and how much more likely the caption makes them."""

    image_token_ids: Int[Tensor, "batch image_length"]
    log_likelihood_ratio: Float[Tensor, " batch"]
    """log p(image | caption) - log p(image) in nats; zeros when guidance is off."""


@torch.inference_mode()
def generate_image_token_ids(
    model: TextToImageModel | NativeDecoder,
    text_token_ids: Int[Tensor, "batch text_length"],
    *,
    seeds: Int[Tensor, " batch"],
    sampling_config: SamplingConfig,
) -> GeneratedTokens:
    """Generate one image's tokens for every caption.

    Args:
        model: In evaluation mode.
        text_token_ids: Captions, padded; the batch may have any size.
        seeds: One per image, in [0, 2 ** 63).
        sampling_config: Guidance and filters.

    Returns:
        Tokens in raster order, and the caption's gain.

    Raises:
        ValueError: If there is not one seed per caption.
    """
    if len(seeds) != len(text_token_ids):
        raise ValueError(
            f"seeds: got {len(seeds)}, expected one per caption, {len(text_token_ids)}"
        )
    generated = []
    for start in range(0, max(len(seeds), 1), ROWS_PER_BATCH):
        text = text_token_ids[start : start + ROWS_PER_BATCH]
        some_seeds = seeds[start : start + ROWS_PER_BATCH]
        if text.is_cuda and not isinstance(model, NativeDecoder):
            part = generate_sequentially(
                model, text, seeds=some_seeds, sampling_config=sampling_config
            )
        else:
            window = best_window(model, len(text))
            tokens, log_likelihood_ratio, _ = jacobi_decode(
                model, text, seeds=some_seeds, sampling_config=sampling_config, window=window
            )
            part = GeneratedTokens(tokens, log_likelihood_ratio)
        generated.append(part)
    return GeneratedTokens(*(torch.cat(parts) for parts in zip(*generated, strict=True)))


@torch.inference_mode()
def generate_sequentially(
    model: TextToImageModel,
    text_token_ids: Int[Tensor, "batch text_length"],
    *,
    seeds: Int[Tensor, " batch"],
    sampling_config: SamplingConfig,
) -> GeneratedTokens:
    """Generate one batch token by token: what GPUs do best, and the plain way elsewhere.

    Args:
        model: In evaluation mode.
        text_token_ids: Captions, padded.
        seeds: One per image.
        sampling_config: Guidance and filters.

    Returns:
        Tokens in raster order, and the caption's gain.
    """
    seeds = seeds.to(text_token_ids.device)
    sampler = Sampler(model.config, seeds=seeds, sampling_config=sampling_config)
    captions = sampler.caption_rows(text_token_ids)
    cache = model.new_cache(len(captions))
    steps = torch.arange(model.config.image_length, device=seeds.device).split(1)
    sampler.sample_and_record(model.prefill(captions, cache), steps[0])
    if text_token_ids.is_cuda:
        run_cuda_graph(model, sampler, cache)
    else:
        for index, step in enumerate(steps[1:]):
            last = sampler.for_each_row(sampler.tokens[:, index])
            sampler.sample_and_record(
                model.decode_one(last, cache, cell=index, next_cell=index + 1), step
            )
    return GeneratedTokens(sampler.tokens, sampler.log_likelihood_ratio)
