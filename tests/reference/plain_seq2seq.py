"""The caption encoder and image decoder, written out: one row, one head, one query at a time.

In float64 and without a cache, with the parts of ``plain_decoder`` that are the same.
"""

import math

import torch
from torch import Tensor

from dalle_mini_impl.models.dalle_config import DalleConfig
from tests.reference.plain_decoder import norm, rotation_matrix, token_row

Cells = list[int | None]


def plain_image_logits(
    weights: dict[str, Tensor],
    config: DalleConfig,
    text: list[int],
    image: list[int],
    order: list[int],
) -> Tensor:
    """Image logits of one caption and one image, cell by cell in ``order``."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    words = []
    for place, token in enumerate(text):
        is_pad = token == 0
        table = weights["text_pads.weight" if is_pad else "text_embedding.weight"]
        words.append(table[place if is_pad else token] + weights["text_positions.weight"][place])
    context = torch.stack(words)
    unrotated: Cells = [None] * len(text)
    for layer in range(config.decoder.num_encoder_layers):
        name = f"encoder_blocks.{layer}."
        normed = norm(context, weights, f"{name}attention_norm")
        context = context + attention(
            normed, unrotated, normed, unrotated, weights, f"{name}attention.", config, len(text)
        )
        context = context + feed_forward(context, weights, name)
    context = norm(context, weights, "encoder_norm")

    vectors = [weights["image_start"] + weights["target_positions.weight"][order[0]]]
    cells: Cells = [None]
    for place in range(len(image) - 1):
        vector = token_row(weights, config, "image_embedding", image[place])
        vectors.append(vector + weights["target_positions.weight"][order[place + 1]])
        cells.append(order[place])
    stream = torch.stack(vectors)
    nowhere: Cells = [None] * len(cells)
    for layer in range(config.decoder.num_layers):
        name = f"blocks.{layer}."
        normed = norm(stream, weights, f"{name}attention_norm")
        stream = stream + attention(
            normed, cells, normed, cells, weights, f"{name}attention.", config, None
        )
        normed = norm(stream, weights, f"{name}cross_attention_norm")
        cross = f"{name}cross_attention."
        stream = stream + attention(
            normed, nowhere, context, unrotated, weights, cross, config, len(text)
        )
        stream = stream + feed_forward(stream, weights, name)
    stream = norm(stream, weights, "output_norm")
    codes = range(config.codebook_size)
    head = torch.stack([token_row(weights, config, "image_head", token) for token in codes])
    return stream @ head.T


def attention(
    asking: Tensor,
    asking_cells: Cells,
    answering: Tensor,
    answering_cells: Cells,
    weights: dict[str, Tensor],
    name: str,
    config: DalleConfig,
    num_seen: int | None,
) -> Tensor:
    """What each query gathers: from the first ``num_seen`` positions, or up to its own (None)."""
    queries = asking @ weights[f"{name}query.weight"].T
    keys, values = (answering @ weights[f"{name}{kind}.weight"].T for kind in ("key", "value"))
    size = config.decoder.head_dim
    rows = []
    for i, cell in enumerate(asking_cells):
        mixed = []
        for start in range(0, config.decoder.hidden_size, size):
            part = slice(start, start + size)
            query = norm(queries[i, part], weights, f"{name}query_norm")
            query = rotation_matrix(cell, config) @ query
            seen = range(i + 1 if num_seen is None else num_seen)
            scores = []
            for j in seen:
                key = norm(keys[j, part], weights, f"{name}key_norm")
                key = rotation_matrix(answering_cells[j], config) @ key
                scores.append(math.exp(float(query @ key) / math.sqrt(size)))
            total = torch.zeros(size, dtype=torch.float64)
            for j in seen:
                total = total + scores[j] / sum(scores) * values[j, part]
            mixed.append(total)
        rows.append(torch.cat(mixed))
    return torch.stack(rows) @ weights[f"{name}output.weight"].T


def feed_forward(stream: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """SwiGLU of the normalized stream."""
    normed = norm(stream, weights, f"{name}feed_forward_norm")
    gate = normed @ weights[f"{name}feed_forward.gate.weight"].T
    inner = gate / (1 + torch.exp(-gate)) * (normed @ weights[f"{name}feed_forward.value.weight"].T)
    return inner @ weights[f"{name}feed_forward.output.weight"].T
