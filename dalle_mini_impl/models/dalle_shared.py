"""What both text-to-image models share: output heads, embeddings, caches, initialization."""

from math import prod
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_mini_impl.models.dalle_config import DalleConfig
from dalle_mini_impl.transformer.key_value_cache import KeyValueCache


class DalleLogits(NamedTuple):
    """Unnormalised log-probabilities of the next token, in nats."""

    text: Float[Tensor, "batch text_length vocab"] | None
    """None of a model that reads captions and does not write them."""
    image: Float[Tensor, "batch image_length codebook_size"]


class FactorizedEmbedding(nn.Module):
    """One row per image token: a row of its own plus a shared row for each of its digits.

    An FSQ token is a number whose digits are its levels. Tokens that share a level share a row, so
    that what is learned of a common token serves its rare neighbors. With a single digit the
    shared rows are left out and this is a plain table.
    """

    def __init__(self, levels: tuple[int, ...], width: int) -> None:
        """Build the table.

        Args:
            levels: Size of each digit, the least significant first.
            width: Length of a row.
        """
        super().__init__()
        self.rows = nn.Parameter(torch.empty(prod(levels), width))
        self.digit_rows = nn.ParameterList(
            nn.Parameter(torch.empty(size, width)) for size in (levels if len(levels) > 1 else ())
        )
        place = 1
        for index, size in enumerate(levels[: len(self.digit_rows)]):
            digits = torch.arange(prod(levels)) // place % size
            self.register_buffer(f"digits_{index}", digits, persistent=False)
            place *= size

    def table(self) -> Float[Tensor, "codebook_size width"]:
        """Add the shared rows to each token's own row."""
        table: Tensor = self.rows
        for index, rows in enumerate(self.digit_rows):
            # Not rows[digits]: the backward pass of indexing is eight times slower on CPUs.
            table = table + F.embedding(self.get_buffer(f"digits_{index}"), rows)
        return table


def steps_and_cells(
    first_steps: Int[Tensor, " batch"],
    image_token_ids: Int[Tensor, "batch window"],
    image_order: Int[Tensor, "batch image_length"] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tell where the tokens of a window stand.

    Args:
        first_steps: Step of each row's first token.
        image_token_ids: Tokens of consecutive steps.
        image_order: Grid cell of each step; raster order when None.

    Returns:
        Step and grid cell of each token, and the cell that comes next: each (batch, window).
    """
    steps = first_steps.unsqueeze(1) + torch.arange(
        image_token_ids.shape[1], device=image_token_ids.device
    )
    if image_order is None:
        return steps, steps, steps + 1
    return steps, image_order.gather(1, steps), image_order.gather(1, steps + 1)


def build_cache(config: DalleConfig, batch_size: int, *, like: Tensor) -> KeyValueCache:
    """Reserve a cache for one batch.

    Args:
        config: Of the decoder.
        batch_size: Rows.
        like: A tensor of the device and dtype that are expected.

    Returns:
        An empty cache for all positions.
    """
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
    """Set every weight of a fresh decoder.

    Matrices and embeddings are normal with standard deviation 0.02; the matrices that write into
    the residual stream are divided by sqrt(num_branches), so that its variance does not grow
    with depth (GPT-2); all heads are zero, so that training starts at the uniform distribution,
    and so are biases.

    Args:
        model: Changed in place.
        num_branches: Of the residual stream, two per block without cross-attention.
    """
    residual_std = 0.02 / num_branches**0.5
    for name, parameter in model.named_parameters():
        if "_head." in name or name.endswith(".bias"):
            nn.init.zeros_(parameter)
        elif name.endswith("output.weight"):
            nn.init.normal_(parameter, std=residual_std)
        elif "norm" not in name:
            nn.init.normal_(parameter, std=0.02)
