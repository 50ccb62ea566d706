"""Drawing image tokens from a decoder, with a key-value cache and batched guidance.

A picture depends on its prompt, its seed and the settings alone: its noise comes from its seed.
Only rounding differs with what is drawn beside it, since matrix products of other shapes add up in
another order; that tips a token only where two are equally likely to six digits.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle_mini_impl.models.text_to_image import TextToImageModel
from dalle_mini_impl.native.decoder import NativeDecoder
from dalle_mini_impl.sampling.cuda_graph import replay_steps
from dalle_mini_impl.sampling.jacobi import best_window, draw_by_jacobi
from dalle_mini_impl.sampling.sampler import SamplingConfig, TokenChoice

ROWS_PER_BATCH = 16  # pictures drawn together


class DrawnTokens(NamedTuple):
    """Image tokens, and how much more likely the caption makes them."""

    image_token_ids: Int[Tensor, "batch image_length"]
    caption_gain: Float[Tensor, " batch"]
    """log p(image | caption) - log p(image) in nats; zeros when guidance is off."""


@torch.inference_mode()
def generate_image_token_ids(
    model: TextToImageModel | NativeDecoder,
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
        text = text_token_ids[start : start + ROWS_PER_BATCH]
        some_seeds = seeds[start : start + ROWS_PER_BATCH]
        if text.is_cuda and not isinstance(model, NativeDecoder):
            part = draw_rows(model, text, seeds=some_seeds, settings=settings)
        else:
            window = best_window(model, len(text))
            tokens, gain, _ = draw_by_jacobi(
                model, text, seeds=some_seeds, settings=settings, window=window
            )
            part = DrawnTokens(tokens, gain)
        drawn.append(part)
    return DrawnTokens(*(torch.cat(parts) for parts in zip(*drawn, strict=True)))


@torch.inference_mode()
def draw_rows(
    model: TextToImageModel,
    text_token_ids: Int[Tensor, "batch text_length"],
    *,
    seeds: Int[Tensor, " batch"],
    settings: SamplingConfig,
) -> DrawnTokens:
    """Draw one batch token by token: what GPUs do best, and the plain way elsewhere.

    Args:
        model: In evaluation mode.
        text_token_ids: Captions, padded.
        seeds: One per picture.
        settings: Guidance and filters.

    Returns:
        Tokens in raster order, and the caption's gain.
    """
    seeds = seeds.to(text_token_ids.device)
    choice = TokenChoice(model.config, seeds=seeds, settings=settings)
    captions = choice.caption_rows(text_token_ids)
    cache = model.new_cache(len(captions))
    steps = torch.arange(model.config.image_length, device=seeds.device).split(1)
    choice.choose(model.prefill(captions, cache), steps[0])
    if text_token_ids.is_cuda:
        replay_steps(model, choice, cache)
    else:
        for index, step in enumerate(steps[1:]):
            last = choice.for_each_row(choice.tokens[:, index])
            choice.choose(model.decode_one(last, cache, cell=index, next_cell=index + 1), step)
    return DrawnTokens(choice.tokens, choice.gain)
