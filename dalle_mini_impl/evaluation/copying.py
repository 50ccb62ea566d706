"""Does the model copy? Drawn pictures against their nearest training pictures, in tokens.

A sample that shares most of its tokens with one training picture may be a copy. The same share
for held-out true pictures says how much is to be expected from pictures that cannot be copies.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

COPY_THRESHOLD = 0.9  # share of equal tokens from which a picture counts as a copy


@dataclass(frozen=True)
class CopyingReport:
    """Agreement with the nearest training picture, as shares of tokens in [0, 1]."""

    drawn_agreement: float
    """Mean over drawn pictures."""
    held_out_agreement: float
    """Mean over true pictures that the model never saw."""
    drawn_copies: float
    """Share of drawn pictures with at least ``COPY_THRESHOLD`` agreement."""
    held_out_copies: float
    """The same share of the held-out pictures."""


def report_copying(
    drawn: Int[Tensor, "drawn image_length"],
    held_out: Int[Tensor, "held_out image_length"],
    train: Int[Tensor, "train image_length"],
) -> CopyingReport:
    """Compare drawn and held-out pictures with all training pictures.

    Args:
        drawn: Tokens of pictures that the model drew.
        held_out: Tokens of true pictures outside the training set.
        train: Tokens of the training set.

    Returns:
        Mean agreements and shares of copies.
    """
    of_drawn, of_held_out = nearest_agreement(drawn, train), nearest_agreement(held_out, train)
    return CopyingReport(
        float(of_drawn.mean()),
        float(of_held_out.mean()),
        float((of_drawn >= COPY_THRESHOLD).float().mean()),
        float((of_held_out >= COPY_THRESHOLD).float().mean()),
    )


def nearest_agreement(
    token_ids: Int[Tensor, "batch image_length"], train: Int[Tensor, "train image_length"]
) -> Float[Tensor, " batch"]:
    """Find, for each picture, the largest share of tokens that it has in common with one other.

    Args:
        token_ids: Pictures.
        train: Pictures to compare with.

    Returns:
        Shares in [0, 1].
    """
    return torch.stack([(train == row).float().mean(dim=1).max() for row in token_ids])
