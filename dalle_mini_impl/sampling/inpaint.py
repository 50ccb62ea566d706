"""Completing an image: some of its tokens stay, the others are generated anew.

The tokens that stay come first, the others after them, so that each sampled token depends on all that
stay, on whatever side of it they stand. Only a decoder that learned random orders has seen that;
one that learned raster order alone can go on where the tokens that stay end, as in figure 2 (d)
of DALL-E.

Source: Ramesh et al. 2021, arXiv:2102.12092 (the rows above are given); Yu et al. 2024,
arXiv:2411.00776 (the decoder is told which cell comes next); Pang et al. 2024, arXiv:2412.01827
(inpainting by giving the known tokens first).
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dalle_mini_impl.models.text_to_image import TextToImageModel
from dalle_mini_impl.native.decoder import NativeDecoder
from dalle_mini_impl.sampling.generate import ROWS_PER_BATCH, GeneratedTokens
from dalle_mini_impl.sampling.jacobi import best_window, jacobi_decode
from dalle_mini_impl.sampling.sampler import SamplingConfig


def inpainting_order(
    is_masked: Bool[Tensor, "batch image_length"],
) -> Int[Tensor, "batch image_length"]:
    """Put the cells that stay before those that are inpainted, each group in raster order.

    Args:
        is_masked: Which cells (raster order) are generated anew.

    Returns:
        Grid cell of each step.
    """
    return is_masked.long().argsort(dim=1, stable=True)


def is_raster_order(order: Int[Tensor, "batch image_length"]) -> bool:
    """Say whether these are all the order that every decoder has learned.

    Args:
        order: Grid cell of each step.

    Returns:
        True if so.
    """
    return torch.equal(order, torch.arange(order.shape[1], device=order.device).expand_as(order))


@torch.inference_mode()
def inpaint_image_token_ids(
    model: TextToImageModel | NativeDecoder,
    text_token_ids: Int[Tensor, "batch text_length"],
    image_token_ids: Int[Tensor, "batch image_length"],
    is_masked: Bool[Tensor, "batch image_length"],
    *,
    seeds: Int[Tensor, " batch"],
    sampling_config: SamplingConfig,
) -> GeneratedTokens:
    """Generate some tokens of every image anew.

    Args:
        model: In evaluation mode; trained in random order unless the tokens that stay are the
            first ones.
        text_token_ids: Captions, padded; the batch may have any size.
        image_token_ids: The images, raster order.
        is_masked: Which tokens are generated anew: as many in each row.
        seeds: One per image, in [0, 2 ** 63).
        sampling_config: Guidance and filters. A guidance schedule counts the tokens that stay as generated.

    Returns:
        Tokens in raster order, and the caption's gain on those that were generated.

    Raises:
        ValueError: If the rows inpaint different numbers of tokens, or none.
    """
    counts = is_masked.sum(dim=1).unique().tolist()
    if len(counts) != 1 or counts == [0]:
        raise ValueError(
            f"is_masked: got {counts} tokens, expected as many in each row, at least 1"
        )
    num_known = model.config.image_length - counts[0]
    order = inpainting_order(is_masked)
    known = image_token_ids.gather(1, order)[:, :num_known]
    generated = []
    for start in range(0, len(seeds), ROWS_PER_BATCH):
        rows = slice(start, start + ROWS_PER_BATCH)
        tokens, log_likelihood_ratio, _ = jacobi_decode(
            model,
            text_token_ids[rows],
            seeds=seeds[rows],
            sampling_config=sampling_config,
            window=best_window(model, len(seeds[rows])),
            image_order=order[rows],
            known_token_ids=known[rows],
        )
        generated.append(
            GeneratedTokens(
                torch.empty_like(tokens).scatter_(1, order[rows], tokens), log_likelihood_ratio
            )
        )
    return GeneratedTokens(*(torch.cat(parts) for parts in zip(*generated, strict=True)))
