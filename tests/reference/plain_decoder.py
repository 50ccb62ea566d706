"""The decoder once more, written from its docstrings: one row, one head, one query at a time.

In float64, with explicit rotation matrices, and without a cache.
"""

import math

import torch
from torch import Tensor

from dalle_mini_impl.models.dalle import DalleConfig


def plain_logits(
    weights: dict[str, Tensor],
    config: DalleConfig,
    text: list[int],
    image: list[int],
    order: list[int],
) -> tuple[Tensor, Tensor]:
    """Text and image logits of one caption and one picture, drawn cell by cell in ``order``."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    vectors = [weights["text_start"]]
    cells: list[int | None] = [None]
    for place, token in enumerate(text):
        is_pad = token == 0
        vector = weights["text_pads.weight" if is_pad else "text_embedding.weight"][
            place if is_pad else token
        ]
        vector = vector + weights["text_positions.weight"][place]
        if place == len(text) - 1:
            vector = vector + weights["target_positions.weight"][order[0]]
        vectors.append(vector)
        cells.append(None)
    for place in range(len(image) - 1):
        vector = token_row(weights, config, "image_embedding", image[place])
        vector = vector + position_vector(weights, config, order[place])
        vectors.append(vector + weights["target_positions.weight"][order[place + 1]])
        cells.append(order[place])
    stream = torch.stack(vectors)
    for layer in range(config.decoder.num_layers):
        stream = block(stream, cells, weights, f"blocks.{layer}.", config)
    stream = norm(stream, weights["output_norm.weight"])
    text_logits = [weights["text_head.weight"] @ vector for vector in stream[: len(text)]]
    head = [
        token_row(weights, config, "image_head", token) for token in range(config.codebook_size)
    ]
    image_logits = [torch.stack(head) @ vector for vector in stream[len(text) :]]
    return torch.stack(text_logits), torch.stack(image_logits)


def token_row(weights: dict[str, Tensor], config: DalleConfig, table: str, token: int) -> Tensor:
    """The token's own row plus one row for each of its digits, if it has more than one."""
    vector = weights[f"{table}.rows"][token]
    if len(config.codebook_levels) > 1:
        rest = token
        for index, level in enumerate(config.codebook_levels):
            rest, digit = divmod(rest, level)
            vector = vector + weights[f"{table}.digit_rows.{index}"][digit]
    return vector


def position_vector(weights: dict[str, Tensor], config: DalleConfig, cell: int) -> Tensor:
    """What is added to an image token because of where it stands."""
    y, x = divmod(cell, config.image_grid_size[1])
    width = config.decoder.hidden_size
    if config.decoder.positions == "learned":
        return weights["image_positions.weight"][cell]
    if config.decoder.positions == "axial":
        return weights["row_positions.weight"][y] + weights["column_positions.weight"][x]
    if config.decoder.positions == "sinusoidal":
        angles = pair_angles(y, x, width)
        values = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        return torch.tensor(values, dtype=torch.float64)
    return torch.zeros(width, dtype=torch.float64)


def pair_angles(y: int, x: int, width: int) -> list[float]:
    """The angle of every pair: the first half of the pairs turns by row, the others by column."""
    quarter = width // 4
    frequencies = [10_000 ** -(index / quarter) for index in range(quarter)]
    return [y * frequency for frequency in frequencies] + [x * f for f in frequencies]


def rotation_matrix(cell: int | None, config: DalleConfig) -> Tensor:
    """Rotates each pair (i, i + half) of a head by its angle; text is not rotated."""
    size = config.decoder.head_dim
    matrix = torch.eye(size, dtype=torch.float64)
    if cell is None or config.decoder.positions != "rotary":
        return matrix
    half = size // 2
    for i, angle in enumerate(pair_angles(*divmod(cell, config.image_grid_size[1]), size)):
        matrix[i, i] = matrix[i + half, i + half] = math.cos(angle)
        matrix[i, i + half], matrix[i + half, i] = -math.sin(angle), math.sin(angle)
    return matrix


def block(
    stream: Tensor,
    cells: list[int | None],
    weights: dict[str, Tensor],
    name: str,
    config: DalleConfig,
) -> Tensor:
    """Attention beside an identity, then SwiGLU beside an identity."""
    normed = norm(stream, weights[f"{name}attention_norm.weight"])
    queries, keys, values = (
        normed @ weights[f"{name}attention.{kind}.weight"].T for kind in ("query", "key", "value")
    )
    size = config.decoder.head_dim
    heads = []
    for start in range(0, config.decoder.hidden_size, size):
        part = slice(start, start + size)
        mixed = []
        for i, cell in enumerate(cells):
            scale = weights[f"{name}attention.query_norm.weight"]
            query = rotation_matrix(cell, config) @ norm(queries[i, part], scale)
            scores = []
            for j in range(i + 1):
                scale = weights[f"{name}attention.key_norm.weight"]
                key = rotation_matrix(cells[j], config) @ norm(keys[j, part], scale)
                scores.append(float(query @ key) / math.sqrt(size))
            shares = [math.exp(score - max(scores)) for score in scores]
            mixed.append(
                sum(
                    (share / sum(shares) * values[j, part] for j, share in enumerate(shares)),
                    torch.zeros(size, dtype=torch.float64),
                )
            )
        heads.append(torch.stack(mixed))
    stream = stream + torch.cat(heads, dim=1) @ weights[f"{name}attention.output.weight"].T
    normed = norm(stream, weights[f"{name}feed_forward_norm.weight"])
    gate = normed @ weights[f"{name}feed_forward.gate.weight"].T
    inner = gate / (1 + torch.exp(-gate)) * (normed @ weights[f"{name}feed_forward.value.weight"].T)
    return stream + inner @ weights[f"{name}feed_forward.output.weight"].T


def norm(vectors: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without bias."""
    centred = vectors - vectors.mean(dim=-1, keepdim=True)
    variance = centred.pow(2).mean(dim=-1, keepdim=True)
    return centred / torch.sqrt(variance + 1e-6) * scale
