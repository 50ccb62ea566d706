"""Jacobi decoding: several tokens of an image in one pass of the decoder.

A pass reads the last accepted token and a draft of the tokens after it, and predicts the next
token after each. The noise of every step is fixed by the image's seed, so a prediction is one
definite token. The first one is right; the second one is right if the draft token that it was
conditioned on equals the first; and so on up to the first wrong draft token. The predictions after
it are the draft of the next pass. The fixed point of this iteration is exactly the image that
token-by-token sampling generates, so its distribution is unchanged.

Source: Song et al. 2021, arXiv:2002.03629 (fixed-point view of sequential computation); Santilli et
al. 2023, arXiv:2305.10427 (for greedy decoding); Teng et al. 2024, arXiv:2410.01699 (speculative
Jacobi decoding of images). Deviation: with the noise fixed, sampling is as deterministic as
greedy decoding, so that no acceptance test and no residual distribution is needed.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from dalle_mini_impl.models.text_to_image import TextToImageModel
from dalle_mini_impl.native.decoder import NativeDecoder
from dalle_mini_impl.sampling.logits import gumbel_noise
from dalle_mini_impl.sampling.sampler import GeneratedTokens, Sampler, SamplingConfig

MAX_WINDOW = 32  # measured: 16 needs 50 % more passes, 48 hardly fewer
TOKENS_PER_PASS = 128  # measured on CPUs: more tokens cost as much as they save
# In the compiled decoder, a wider window saves little more than reads of weights and cache.
MAX_NATIVE_WINDOW = 16
NATIVE_TOKENS_PER_PASS = 64


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
) -> GeneratedTokens:
    """Generate the images of ``generate_sequentially`` in fewer passes, tokens in ``image_order``.

    A pass reads ``window`` tokens, the last accepted one included; 1 is one token at a time. The
    first steps take ``known_token_ids``; at least one token must be left to generate.
    """
    if window < 1:
        raise ValueError(f"window: got {window}, expected at least 1 token")
    seeds = seeds.to(text_token_ids.device)
    noise = model.gumbel_noise if isinstance(model, NativeDecoder) else gumbel_noise
    sampler = Sampler(model.config, seeds=seeds, sampling_config=sampling_config, noise=noise)
    num_steps = sampler.num_steps
    if known_token_ids is None:
        known_token_ids = seeds.new_empty(len(seeds), 0)
    num_known = known_token_ids.shape[1]
    if num_known >= num_steps:
        raise ValueError(f"known_token_ids: got {num_known} of {num_steps}, expected fewer")

    # Read captions and known tokens, and sample the first token.
    captions = sampler.caption_rows(text_token_ids)
    order = None if image_order is None else sampler.for_each_row(image_order)
    cache = model.new_cache(len(captions))
    logits = model.prefill(captions, cache, image_order=order)
    num_passes = 1
    if num_known:
        known = sampler.for_each_row(known_token_ids)
        start = torch.zeros_like(known[:, 0])
        logits = model.decode_window(known, cache, first_steps=start, image_order=order)[:, -1]
        num_passes = 2
    first_token, new_log_ratios = sampler.sample(
        logits.unsqueeze(1), torch.full_like(seeds, num_known).unsqueeze(1)
    )
    # Both are (batch, num_steps). A token's best first draft is the token before it.
    draft_tokens = first_token.repeat(1, num_steps)
    draft_tokens[:, :num_known] = known_token_ids
    log_ratios = torch.zeros_like(draft_tokens, dtype=torch.float32)
    log_ratios[:, num_known : num_known + 1] = new_log_ratios

    steps = torch.arange(num_steps, device=seeds.device)
    num_accepted = torch.full_like(seeds, num_known + 1)  # of each image, from its start
    window = min(window, max(num_steps - 1 - num_known, 1))
    while len(seeds) and int(num_accepted.min()) < num_steps:
        # 1. Verify the draft: read a window of it from the last accepted token on. Near the end
        # the window reaches back over accepted tokens, since it must not go beyond the image.
        first = (num_accepted - 1).clamp_max(num_steps - 1 - window)
        read = first.unsqueeze(1) + steps[:window]  # (batch, window): steps that are read
        draft = draft_tokens.gather(1, read)
        logits = model.decode_window(
            sampler.for_each_row(draft),
            cache,
            first_steps=sampler.for_each_row(first),
            image_order=order,
        )
        num_passes += 1
        verified_tokens, new_log_ratios = sampler.sample(logits, read + 1)
        # Accepted tokens stay, even if they round differently now: later ones depend on them.
        is_open = read + 1 >= num_accepted.unsqueeze(1)
        verified_tokens = verified_tokens.where(is_open, draft_tokens.gather(1, read + 1))
        new_log_ratios = new_log_ratios.where(is_open, log_ratios.gather(1, read + 1))
        # 2. Accept the longest right prefix: a token is right if all draft tokens before it were.
        was_right = (verified_tokens[:, :-1] == draft[:, 1:]).long().cumprod(dim=1)
        num_accepted = first + 2 + was_right.sum(dim=1)
        # 3. The rest is the next draft; beyond the window it repeats the last verified token.
        draft_tokens = draft_tokens.where(steps <= read[:, -1:], verified_tokens[:, -1:])
        draft_tokens.scatter_(1, read + 1, verified_tokens)
        log_ratios.scatter_(1, read + 1, new_log_ratios)
    return GeneratedTokens(draft_tokens, log_ratios.sum(dim=1), num_passes)


def best_window(model: TextToImageModel | NativeDecoder, num_images: int) -> int:
    """Choose the fastest window for a batch of images, as measured on CPUs."""
    if isinstance(model, NativeDecoder):
        return max(min(NATIVE_TOKENS_PER_PASS // max(num_images, 1), MAX_NATIVE_WINDOW), 1)
    return max(min(TOKENS_PER_PASS // max(num_images, 1), MAX_WINDOW), 1)
