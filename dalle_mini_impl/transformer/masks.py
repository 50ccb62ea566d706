"""Attention masks. **True means may attend**, everywhere in this project, as in torch's SDPA."""

import torch
from jaxtyping import Bool
from torch import Tensor


def causal_mask(
    length: int, *, device: torch.device | str = "cpu"
) -> Bool[Tensor, "length length"]:
    """Let position i attend to positions <= i.

    Args:
        length: Positions of the sequence.
        device: Where the mask lives.

    Returns:
        Lower-triangular mask, (query, key).
    """
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def padding_mask(
    is_token: Bool[Tensor, "batch key_length"],
) -> Bool[Tensor, "batch 1 1 key_length"]:
    """Let every position attend to the real tokens of its row, in both directions.

    Args:
        is_token: True where a token stands, False where the row is padded.

    Returns:
        A mask that broadcasts over heads and queries.
    """
    return is_token[:, None, None, :]
