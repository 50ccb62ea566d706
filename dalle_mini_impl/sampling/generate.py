"""Generating image tokens: the entry point, which chooses the fastest path.

An image depends on its prompt, its seed and the sampling config alone: its noise comes from its
seed. Only rounding depends on the rest of the batch, since matrix products of other shapes sum in
another order; this flips a token only if two are equally likely to about six digits.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from dalle_mini_impl.models.text_to_image import TextToImageModel
from dalle_mini_impl.native.decoder import NativeDecoder
from dalle_mini_impl.sampling.cuda_graph import run_cuda_graph
from dalle_mini_impl.sampling.jacobi import best_window, jacobi_decode
from dalle_mini_impl.sampling.sampler import GeneratedTokens, Sampler, SamplingConfig

ROWS_PER_BATCH = 16  # images generated together


@torch.inference_mode()
def generate_image_token_ids(
    model: TextToImageModel | NativeDecoder,
    text_token_ids: Int[Tensor, "batch text_length"],
    *,
    seeds: Int[Tensor, " batch"],
    sampling_config: SamplingConfig,
    image_order: Int[Tensor, "batch image_length"] | None = None,
    known_token_ids: Int[Tensor, "batch num_known"] | None = None,
) -> GeneratedTokens:
    """Generate one image's tokens for every caption; the batch may have any size.

    Seeds are in [0, 2 ** 63). Tokens come in the order of ``image_order``, the grid cell of each
    step (raster order when None); ``known_token_ids`` are those of the first steps, given.
    """
    if len(seeds) != len(text_token_ids):
        raise ValueError(
            f"seeds: got {len(seeds)}, expected one per caption, {len(text_token_ids)}"
        )
    parts = []
    for start in range(0, max(len(seeds), 1), ROWS_PER_BATCH):
        rows = slice(start, start + ROWS_PER_BATCH)
        text = text_token_ids[rows]
        # GPUs are fastest with one CUDA-graph step per token, CPUs with few passes over several
        # tokens. Only Jacobi decoding supports `image_order` and `known_token_ids`.
        is_plain = image_order is None and known_token_ids is None
        if text.is_cuda and is_plain and not isinstance(model, NativeDecoder):
            part = generate_sequentially(
                model, text, seeds=seeds[rows], sampling_config=sampling_config
            )
        else:
            part = jacobi_decode(
                model,
                text,
                seeds=seeds[rows],
                sampling_config=sampling_config,
                window=best_window(model, len(text)),
                image_order=None if image_order is None else image_order[rows],
                known_token_ids=None if known_token_ids is None else known_token_ids[rows],
            )
        parts.append(part)
    return GeneratedTokens(
        torch.cat([part.image_token_ids for part in parts]),
        torch.cat([part.log_likelihood_ratio for part in parts]),
        sum(part.num_passes for part in parts),
    )


@torch.inference_mode()
def generate_sequentially(
    model: TextToImageModel,
    text_token_ids: Int[Tensor, "batch text_length"],
    *,
    seeds: Int[Tensor, " batch"],
    sampling_config: SamplingConfig,
) -> GeneratedTokens:
    """Generate one batch token by token, in raster order: the fast path on GPUs."""
    seeds = seeds.to(text_token_ids.device)
    sampler = Sampler(model.config, seeds=seeds, sampling_config=sampling_config)
    captions = sampler.caption_rows(text_token_ids)
    cache = model.new_cache(len(captions))
    num_images, num_steps = len(seeds), sampler.num_steps
    image_token_ids = torch.zeros(num_images, num_steps, dtype=torch.long, device=seeds.device)
    log_likelihood_ratio = torch.zeros(num_images, device=seeds.device)
    step = torch.zeros(1, dtype=torch.long, device=seeds.device)

    def sample_and_record(logits: Tensor) -> None:
        token, log_ratio = sampler.sample(logits.unsqueeze(1), step.expand(num_images, 1))
        image_token_ids.index_copy_(1, step, token)
        log_likelihood_ratio.add_(log_ratio.squeeze(1))
        step.add_(1)

    # The very same operations on the same tensors at every step, so that one captured CUDA graph
    # serves all of them: what changes, the step included, lies in tensors that it updates in place.
    def advance() -> None:
        last = sampler.for_each_row(image_token_ids.index_select(1, step - 1))  # (rows, 1)
        logits = model.decode_window(last, cache, first_steps=(step - 1).expand(len(captions)))
        sample_and_record(logits[:, 0])

    sample_and_record(model.prefill(captions, cache))
    if text_token_ids.is_cuda:
        run_cuda_graph(advance, num_steps - 1)
    else:
        for _ in range(num_steps - 1):
            advance()
    return GeneratedTokens(image_token_ids, log_likelihood_ratio, num_passes=num_steps)
