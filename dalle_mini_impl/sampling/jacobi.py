"""Jacobi decoding: several tokens of an image in one pass of the decoder.

A pass reads the last certain token and guesses of the tokens after it, and says for each what
would follow. The noise of every step is fixed by the image's seed, so "what would follow" is one
definite token. The first answer is certain; the second is certain if the guess that it was
conditioned on is the first answer; and so on up to the first guess that was wrong. The other
answers are the guesses of the next pass. What comes out is the fixed point of all guesses, which
is the very image that one token at a time makes: there is nothing to prove about distributions.

Source: Song et al. 2021, arXiv:2002.03629 (fixed-point view of sequential computation); Santilli et
al. 2023, arXiv:2305.10427 (for greedy decoding); Teng et al. 2024, arXiv:2410.01699 (speculative
Jacobi decoding of images). Deviation: with the noise fixed, sampling is as deterministic as
greedy decoding, so that no acceptance test and no residual distribution is needed.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle_mini_impl.models.text_to_image import TextToImageModel
from dalle_mini_impl.native.decoder import NativeDecoder
from dalle_mini_impl.sampling.logits import gumbel_noise
from dalle_mini_impl.sampling.sampler import Sampler, SamplingConfig

MAX_WINDOW = 32  # measured: 16 needs half as many passes again, 48 hardly fewer
TOKENS_PER_PASS = 128  # measured on CPUs: more cost as much as they save
# A compiled pass has little to save besides the reading of weights and cache.
MAX_NATIVE_WINDOW = 16
NATIVE_TOKENS_PER_PASS = 64


class JacobiTokens(NamedTuple):
    """Image tokens, the caption's gain, and what they took."""

    image_token_ids: Int[Tensor, "batch image_length"]
    log_likelihood_ratio: Float[Tensor, " batch"]
    """log p(image | caption) - log p(image) in nats; zeros when guidance is off."""
    num_passes: int
    """Passes of the decoder over all rows, the captions' included."""


def best_window(model: TextToImageModel | NativeDecoder, num_images: int) -> int:
    """Choose how many tokens of each image to read per pass.

    Args:
        model: That generates.
        num_images: Generated together.

    Returns:
        The fastest window, as measured on CPUs.
    """
    if isinstance(model, NativeDecoder):
        return max(min(NATIVE_TOKENS_PER_PASS // max(num_images, 1), MAX_NATIVE_WINDOW), 1)
    return max(min(TOKENS_PER_PASS // max(num_images, 1), MAX_WINDOW), 1)


@torch.inference_mode()
def jacobi_decode(
    model: TextToImageModel | NativeDecoder,
    text_token_ids: Int[Tensor, "batch text_length"],
    *,
    seeds: Int[Tensor, " batch"],
    sampling_config: SamplingConfig,
    window: int = MAX_WINDOW,
    image_order: Int[Tensor, "batch image_length"] | None = None,
    known_token_ids: Int[Tensor, "batch num_known"] | None = None,
) -> JacobiTokens:
    """Generate images in fewer passes; the same images as one token at a time.

    Args:
        model: In evaluation mode.
        text_token_ids: Captions, padded.
        seeds: One per image, in [0, 2 ** 63).
        sampling_config: Guidance and filters.
        window: Tokens read per pass, the certain one included; 1 is one token at a time.
        image_order: Grid cell of each step; raster order when None.
        known_token_ids: Tokens of the first steps, which are read and not generated.

    Returns:
        Tokens in generation order, the caption's gain, and the number of passes.

    Raises:
        ValueError: If the window is below 1, or every token is known.
    """
    if window < 1:
        raise ValueError(f"window: got {window}, expected at least 1 token")
    seeds = seeds.to(text_token_ids.device)
    noise = model.gumbel_noise if isinstance(model, NativeDecoder) else gumbel_noise
    sampler = Sampler(model.config, seeds=seeds, sampling_config=sampling_config, noise=noise)
    captions = sampler.caption_rows(text_token_ids)
    cache = model.new_cache(len(captions))
    num_steps = sampler.num_steps
    if known_token_ids is None:
        known_token_ids = seeds.new_empty(len(seeds), 0)
    num_known = known_token_ids.shape[1]
    if num_known >= num_steps:
        raise ValueError(f"known_token_ids: got {num_known} of {num_steps}, expected fewer")
    order = None if image_order is None else sampler.for_each_row(image_order)
    logits = model.prefill(captions, cache, first_cell=0 if order is None else order[:, 0])
    num_passes = 1
    if num_known:
        known = sampler.for_each_row(known_token_ids)
        logits = model.decode_window(
            known, cache, first_steps=torch.zeros_like(known[:, 0]), image_order=order
        )[:, -1]
        num_passes = 2
    first_token, new_log_ratios = sampler.sample(
        logits.unsqueeze(1), torch.full_like(seeds, num_known).unsqueeze(1)
    )
    draft_tokens = first_token.repeat(1, num_steps)  # the token before is as good a guess as any
    draft_tokens[:, :num_known] = known_token_ids
    log_ratios = torch.zeros_like(draft_tokens, dtype=torch.float32)
    log_ratios[:, num_known : num_known + 1] = new_log_ratios
    steps = torch.arange(num_steps, device=seeds.device)
    num_accepted = torch.full_like(seeds, num_known + 1)  # tokens from the start of each image
    window = min(window, max(num_steps - 1 - num_known, 1))
    while len(seeds) and int(num_accepted.min()) < num_steps:
        # Near the end the window reaches back over certain tokens: none may go beyond the image.
        first = (num_accepted - 1).clamp_max(num_steps - 1 - window)
        read = first.unsqueeze(1) + steps[:window]
        before = draft_tokens.gather(1, read)
        logits = model.decode_window(
            sampler.for_each_row(before),
            cache,
            first_steps=sampler.for_each_row(first),
            image_order=order,
        )
        num_passes += 1
        verified_tokens, new_log_ratios = sampler.sample(logits, read + 1)
        # Certain tokens stay: another rounding must not change what later ones were conditioned on.
        is_open = read + 1 >= num_accepted.unsqueeze(1)
        verified_tokens = verified_tokens.where(is_open, draft_tokens.gather(1, read + 1))
        new_log_ratios = new_log_ratios.where(is_open, log_ratios.gather(1, read + 1))
        was_accepted = (verified_tokens[:, :-1] == before[:, 1:]).long().cumprod(dim=1)
        num_accepted = first + 2 + was_accepted.sum(dim=1)
        draft_tokens = draft_tokens.where(steps <= read[:, -1:], verified_tokens[:, -1:])
        draft_tokens.scatter_(1, read + 1, verified_tokens)
        log_ratios.scatter_(1, read + 1, new_log_ratios)
    return JacobiTokens(draft_tokens, log_ratios.sum(dim=1), num_passes)
