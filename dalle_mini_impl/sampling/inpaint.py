"""Inpainting: some tokens of an image are kept, the others are generated again.

The kept tokens come first in the order, so that each new token depends on all of them, on whatever
side they are. Only a decoder that learned random orders has seen that; one that learned raster
order alone can continue after kept tokens at the top, as in figure 2 (d) of DALL-E.

Source: Ramesh et al. 2021, arXiv:2102.12092 (the rows above are given); Yu et al. 2024,
arXiv:2411.00776 (the decoder is told which cell comes next); Pang et al. 2024, arXiv:2412.01827
(inpainting by giving the known tokens first).
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dalle_mini_impl.models.text_to_image import TextToImageModel
from dalle_mini_impl.native.decoder import NativeDecoder
from dalle_mini_impl.sampling.generate import generate_image_token_ids
from dalle_mini_impl.sampling.sampler import GeneratedTokens, SamplingConfig


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
    """Resample the masked tokens of each image; all rows must mask equally many.

    Tokens are in raster order, in and out; the log-likelihood ratio is that of the new ones. A
    guidance schedule counts the kept tokens as generated.
    """
    counts = is_masked.sum(dim=1).unique().tolist()
    if len(counts) != 1 or counts == [0]:
        raise ValueError(
            f"is_masked: got {counts} tokens, expected equally many in each row, at least 1"
        )
    order = inpainting_order(is_masked)
    num_known = model.config.image_length - counts[0]
    generated = generate_image_token_ids(
        model,
        text_token_ids,
        seeds=seeds,
        sampling_config=sampling_config,
        image_order=order,
        known_token_ids=image_token_ids.gather(1, order)[:, :num_known],
    )
    # From generation order back to raster order.
    tokens = torch.empty_like(generated.image_token_ids)
    tokens.scatter_(1, order, generated.image_token_ids)
    return generated._replace(image_token_ids=tokens)


def inpainting_order(
    is_masked: Bool[Tensor, "batch image_length"],
) -> Int[Tensor, "batch image_length"]:
    """Order the grid cells: kept ones first, then masked ones, each group in raster order."""
    return is_masked.long().argsort(dim=1, stable=True)


def is_raster_order(order: Int[Tensor, "batch image_length"]) -> bool:
    """Check for the one order that every decoder has learned."""
    return torch.equal(order, torch.arange(order.shape[1], device=order.device).expand_as(order))
