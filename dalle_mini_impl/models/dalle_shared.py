"""Parts of both text-to-image models: output, embeddings, caches, initialization."""

from math import prod
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_mini_impl.models.dalle_config import DalleConfig
from dalle_mini_impl.transformer.key_value_cache import KeyValueCache


class DalleLogits(NamedTuple):
    """Unnormalized log-probabilities of the next token, in nats."""

    text: Float[Tensor, "batch text_length vocab"] | None
    """None from the encoder-decoder, which reads captions and does not predict them."""
    image: Float[Tensor, "batch image_length codebook_size"]


class FactorizedEmbedding(nn.Module):
    """One row per image token: its own row plus a shared row for each of its digits.

    An FSQ token is a number whose digits are its levels (the least significant first).
    """

    # Tokens with a common digit share that digit's row, so that frequent tokens teach their rare
    # neighbors. With a single digit there are no shared rows, and this is a plain embedding.

    def __init__(self, levels: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.empty(prod(levels), width))
        sizes = levels if len(levels) > 1 else ()
        self.digit_rows = nn.ParameterList(nn.Parameter(torch.empty(size, width)) for size in sizes)
        place_value = 1
        for index, size in enumerate(sizes):
            digits = torch.arange(prod(levels)) // place_value % size
            self.register_buffer(f"digits_{index}", digits, persistent=False)
            place_value *= size

    def forward(self, token_ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape width"]:
        """Look tokens up."""
        return F.embedding(token_ids, self.table())

    def table(self) -> Float[Tensor, "codebook_size width"]:
        """Add the shared rows to each token's own row."""
        table: Tensor = self.rows
        for index, rows in enumerate(self.digit_rows):
            # Not rows[digits]: the backward pass of indexing is eight times slower on CPUs.
            table = table + F.embedding(self.get_buffer(f"digits_{index}"), rows)
        return table


def raster_order(config: DalleConfig, rows: Tensor) -> Int[Tensor, "batch image_length"]:
    """List the grid cells of each of ``rows`` from the top left to the bottom right."""
    return torch.arange(config.image_length, device=rows.device).expand(len(rows), -1)


def steps_and_cells(
    first_steps: Int[Tensor, " batch"],
    image_token_ids: Int[Tensor, "batch window"],
    image_order: Int[Tensor, "batch image_length"] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the step and the grid cell of each token of a window, and the cell that comes next.

    Each is (batch, window). ``image_order`` is the grid cell of each step, raster order when None.
    """
    window = torch.arange(image_token_ids.shape[1], device=image_token_ids.device)
    steps = first_steps.unsqueeze(1) + window
    if image_order is None:
        return steps, steps, steps + 1
    return steps, image_order.gather(1, steps), image_order.gather(1, steps + 1)


def build_cache(config: DalleConfig, batch_size: int, *, like: Tensor) -> KeyValueCache:
    """Reserve an empty cache for all positions, on the device and of the dtype of ``like``."""
    return KeyValueCache(
        num_layers=config.decoder.num_layers,
        batch_size=batch_size,
        num_heads=config.decoder.num_heads,
        max_length=config.sequence_length,
        head_dim=config.decoder.head_dim,
        device=like.device,
        dtype=like.dtype,
    )


def initialize_weights(model: nn.Module, *, num_branches: int) -> None:
    """Set every weight of a fresh model whose residual stream has ``num_branches`` branches."""
    # Divided by sqrt(num_branches), the matrices that write into the residual stream keep its
    # variance from growing with depth (GPT-2).
    residual_std = 0.02 / num_branches**0.5
    for name, parameter in model.named_parameters():
        # With heads of zero, training starts at the uniform distribution. Norms start at one.
        if "_head." in name or name.endswith(".bias"):
            nn.init.zeros_(parameter)
        elif name.endswith("output.weight"):
            nn.init.normal_(parameter, std=residual_std)
        elif "norm" not in name:
            nn.init.normal_(parameter, std=0.02)
