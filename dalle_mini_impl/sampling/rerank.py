"""Choosing the best of several images: by the model's own likelihoods, or by any ranker."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor


@runtime_checkable  # for the checks of types in the tests
class ImageRanker(Protocol):
    """Says how well images fit their prompts."""

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Return one score per image and its prompt; larger is better."""
        ...


def best_of(scores: Float[Tensor, " batch"], *, num_candidates: int) -> Int[Tensor, " groups"]:
    """Pick the best of every run of candidates.

    Args:
        scores: Of all candidates; each prompt's candidates stand together.
        num_candidates: Candidates per pick.

    Returns:
        Indices into ``scores``, one per group.

    Raises:
        ValueError: If the scores do not divide into groups.
    """
    if num_candidates < 1 or len(scores) % num_candidates:
        raise ValueError(
            f"num_candidates: got {num_candidates}, expected a divisor of {len(scores)} scores"
        )
    best = scores.reshape(-1, num_candidates).argmax(dim=1)
    return best + torch.arange(len(best), device=scores.device) * num_candidates
