"""The caption encoder and image decoder, written out: one row, one head, one query at a time.

In float64 and without a cache, with the parts of ``plain_decoder`` that are the same.
"""

import torch
from torch import Tensor

from dalle_mini_impl.models.dalle_config import DalleConfig
from tests.reference.plain_decoder import (
    Cells,
    attention,
    feed_forward,
    image_logits,
    norm,
    text_vector,
    token_row,
)


def plain_image_logits(
    weights: dict[str, Tensor],
    config: DalleConfig,
    text: list[int],
    image: list[int],
    order: list[int],
) -> Tensor:
    """Image logits of one caption and one image, cell by cell in ``order``."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    context = torch.stack([text_vector(weights, *placed) for placed in enumerate(text)])
    unrotated: Cells = [None] * len(text)
    for layer in range(config.decoder.num_encoder_layers):
        name = f"encoder_blocks.{layer}"
        words = norm(context, weights, f"{name}.attention_norm"), unrotated
        context = context + attention(words, words, weights, f"{name}.attention", config, all_see)
        context = context + feed_forward(context, weights, name)
    words = norm(context, weights, "encoder_norm"), unrotated

    vectors = [weights["image_start"] + weights["target_positions.weight"][order[0]]]
    cells: Cells = [None]
    for place in range(len(image) - 1):
        vector = token_row(weights, config, "image_embedding", image[place])
        vectors.append(vector + weights["target_positions.weight"][order[place + 1]])
        cells.append(order[place])
    stream = torch.stack(vectors)
    nowhere: Cells = [None] * len(cells)
    for layer in range(config.decoder.num_layers):
        name = f"blocks.{layer}"
        own = norm(stream, weights, f"{name}.attention_norm"), cells
        stream = stream + attention(own, own, weights, f"{name}.attention", config, causal)
        asking = norm(stream, weights, f"{name}.cross_attention_norm"), nowhere
        cross = f"{name}.cross_attention"
        stream = stream + attention(asking, words, weights, cross, config, all_see)
        stream = stream + feed_forward(stream, weights, name)
    return image_logits(norm(stream, weights, "output_norm"), weights, config)


def all_see(query: int, key: int) -> bool:
    return True


def causal(query: int, key: int) -> bool:
    return key <= query
