"""Choosing the best of several images, by the scores of the decoder or of any ranker."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor


@runtime_checkable  # so that the tests can check types
class ImageRanker(Protocol):
    """Scores how well images fit their prompts."""

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Return one score per image and its prompt; larger is better."""
        ...


def best_of(scores: Float[Tensor, " batch"], *, num_candidates: int) -> Int[Tensor, " groups"]:
    """Return the index of the largest score of each group of adjacent candidates."""
    if num_candidates < 1 or len(scores) % num_candidates:
        raise ValueError(
            f"num_candidates: got {num_candidates}, expected a divisor of {len(scores)} scores"
        )
    best = scores.reshape(-1, num_candidates).argmax(dim=1)  # index within each group
    return best + torch.arange(len(best), device=scores.device) * num_candidates
