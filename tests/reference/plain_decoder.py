"""The decoder written from its docstrings: one row, one head, one query at a time.

In float64, with explicit rotation matrices, and without a cache.
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from dalle_mini_impl.models.dalle_config import DalleConfig

Cells = list[int | None]


def plain_logits(
    weights: dict[str, Tensor],
    config: DalleConfig,
    text: list[int],
    image: list[int],
    order: list[int],
) -> tuple[Tensor, Tensor]:
    """Text and image logits of one caption and one image, cell by cell in ``order``."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    vectors = [weights["text_start"]]
    cells: Cells = [None]
    for place, token in enumerate(text):
        vector = text_vector(weights, place, token)
        if place == len(text) - 1 and config.decoder.has_target_positions:
            vector = vector + weights["target_positions.weight"][order[0]]
        vectors.append(vector)
        cells.append(None)
    for place in range(len(image) - 1):
        vector = token_row(weights, config, "image_embedding", image[place])
        vector = vector + position_vector(weights, config, order[place])
        if config.decoder.has_target_positions:
            vector = vector + weights["target_positions.weight"][order[place + 1]]
        vectors.append(vector)
        cells.append(order[place])
    stream = torch.stack(vectors)
    for layer in range(config.decoder.num_layers):
        stream = block(stream, cells, weights, layer, config)
    stream = norm(stream, weights, "output_norm")
    text_logits = [weights["text_head.weight"] @ vector for vector in stream[: len(text)]]
    return torch.stack(text_logits), image_logits(stream[len(text) :], weights, config)


def image_logits(stream: Tensor, weights: dict[str, Tensor], config: DalleConfig) -> Tensor:
    codes = range(config.codebook_size)
    head = torch.stack([token_row(weights, config, "image_head", token) for token in codes])
    return stream @ head.T


def text_vector(weights: dict[str, Tensor], place: int, token: int) -> Tensor:
    """A token's embedding, or the pad's own of its place, and its position."""
    own = weights["text_embedding.weight"][token] if token else weights["text_pads.weight"][place]
    return own + weights["text_positions.weight"][place]


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
    """The vector that is added to the token of a cell."""
    y, x = divmod(cell, config.image_grid_size[1])
    width = config.decoder.hidden_size
    if config.decoder.positions == "learned":
        return weights["image_positions.cells.weight"][cell]
    if config.decoder.positions == "axial":
        rows, columns = (weights[f"image_positions.{axis}.weight"] for axis in ("rows", "columns"))
        return rows[y] + columns[x]
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


def is_seen(query: int | None, key: int | None, layer: int, config: DalleConfig) -> bool:
    """Whether a cell attends to an earlier one, by DALL-E's figure 11; all see the text."""
    if config.decoder.attention == "dense" or key is None or query is None:
        return True
    width, number = config.image_grid_size[1], layer + 1
    if number == config.decoder.num_layers:
        reach = config.decoder.kernel_size // 2
        offsets = itertools.product(range(reach + 1), range(-reach, reach + 1))
        return key in [query - up * width + right for up, right in offsets]
    if number in range(2, 100, 4):
        return key % width == query % width
    return key in range(query - width, query + 1)


def linear(vectors: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """A matrix product, and a bias if there is one."""
    return vectors @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def attention(
    asking: tuple[Tensor, Cells],
    answering: tuple[Tensor, Cells],
    weights: dict[str, Tensor],
    name: str,
    config: DalleConfig,
    sees: Callable[[int, int], bool],
) -> Tensor:
    """What query i gathers, head by head, from each key j with `sees(i, j)`."""
    queries = linear(asking[0], weights, f"{name}.query")
    keys, values = (linear(answering[0], weights, f"{name}.{kind}") for kind in ("key", "value"))
    size, rows = config.decoder.head_dim, []
    for i, asking_cell in enumerate(asking[1]):
        heads = []
        for start in range(0, config.decoder.hidden_size, size):
            part = slice(start, start + size)
            query = norm(queries[i, part], weights, f"{name}.query_norm")
            query = rotation_matrix(asking_cell, config) @ query
            scores = {}
            for j, cell in enumerate(answering[1]):
                if sees(i, j):
                    key = norm(keys[j, part], weights, f"{name}.key_norm")
                    key = rotation_matrix(cell, config) @ key
                    scores[j] = math.exp(float(query @ key) / math.sqrt(size))
            mixed = torch.zeros(size, dtype=torch.float64)
            for j, score in scores.items():
                mixed = mixed + score / sum(scores.values()) * values[j, part]
            heads.append(mixed)
        rows.append(torch.cat(heads))
    return linear(torch.stack(rows), weights, f"{name}.output")


def feed_forward(stream: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """SwiGLU, or GELU where there is no gate, of the normalized stream."""
    normed = norm(stream, weights, f"{name}.feed_forward_norm")
    if f"{name}.feed_forward.gate.weight" in weights:
        gate = linear(normed, weights, f"{name}.feed_forward.gate")
        value = linear(normed, weights, f"{name}.feed_forward.value")
        inner = gate / (1 + torch.exp(-gate)) * value
    else:
        inner = linear(normed, weights, f"{name}.feed_forward.input")
        inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
    return linear(inner, weights, f"{name}.feed_forward.output")


def block(
    stream: Tensor, cells: Cells, weights: dict[str, Tensor], layer: int, config: DalleConfig
) -> Tensor:
    """Attention, then SwiGLU or GELU, each added to the residual stream."""
    name = f"blocks.{layer}"
    normed = norm(stream, weights, f"{name}.attention_norm"), cells

    def sees(i: int, j: int) -> bool:
        return j <= i and is_seen(cells[i], cells[j], layer, config)

    stream = stream + attention(normed, normed, weights, f"{name}.attention", config, sees)
    return stream + feed_forward(stream, weights, name)


def norm(vectors: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """LayerNorm; nothing where the block has no such norm."""
    if f"{name}.weight" not in weights:
        return vectors
    centered = vectors - vectors.mean(dim=-1, keepdim=True)
    variance = centered.pow(2).mean(dim=-1, keepdim=True)
    normed = centered / torch.sqrt(variance + 1e-6) * weights[f"{name}.weight"]
    return normed + weights.get(f"{name}.bias", 0.0)
