"""Choosing the best of several pictures: by the model's own likelihoods, or by any ranker."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dalle_mini_impl.models.dalle_config import PAD_TOKEN_ID
from dalle_mini_impl.models.text_to_image import TextToImageModel
from dalle_mini_impl.sampling.generate import ROWS_PER_BATCH


@runtime_checkable  # for the checks of types in the tests
class PictureRanker(Protocol):
    """Says how well pictures fit their prompts."""

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Return one score per picture and its prompt; larger is better."""
        ...


@torch.inference_mode()
def caption_gain(
    model: TextToImageModel,
    text_token_ids: Int[Tensor, "batch text_length"],
    image_token_ids: Int[Tensor, "batch image_length"],
) -> Float[Tensor, " batch"]:
    """Measure how much likelier the caption makes each picture.

    This is log p(image | text) - log p(image), the pointwise mutual information of picture and
    caption: unlike log p(image | text) it does not favour pictures that are plain.

    Args:
        model: In evaluation mode.
        text_token_ids: Captions, padded.
        image_token_ids: One picture per caption.

    Returns:
        Gains in nats.
    """
    null = torch.full_like(text_token_ids, PAD_TOKEN_ID)
    given = image_log_likelihood(model, text_token_ids, image_token_ids)
    return given - image_log_likelihood(model, null, image_token_ids)


@torch.inference_mode()
def image_log_likelihood(
    model: TextToImageModel,
    text_token_ids: Int[Tensor, "batch text_length"],
    image_token_ids: Int[Tensor, "batch image_length"],
) -> Float[Tensor, " batch"]:
    """Compute log p(image | text) of each pair.

    Args:
        model: In evaluation mode.
        text_token_ids: Captions, padded; a row of pads gives log p(image).
        image_token_ids: One picture per caption.

    Returns:
        Natural logarithms, summed over the picture's tokens.
    """
    return image_token_log_likelihoods(model, text_token_ids, image_token_ids).sum(dim=1)


@torch.inference_mode()
def image_token_log_likelihoods(
    model: TextToImageModel,
    text_token_ids: Int[Tensor, "batch text_length"],
    image_token_ids: Int[Tensor, "batch image_length"],
) -> Float[Tensor, "batch image_length"]:
    """Compute log p of each image token, given the caption and the tokens before it.

    Args:
        model: In evaluation mode.
        text_token_ids: Captions, padded.
        image_token_ids: One picture per caption.

    Returns:
        Natural logarithms.
    """
    parts = []
    for start in range(0, len(text_token_ids), ROWS_PER_BATCH):
        text, image = (
            ids[start : start + ROWS_PER_BATCH] for ids in (text_token_ids, image_token_ids)
        )
        # Always as many rows: what is scored beside a picture moves its score by rounding at most.
        padding = (0, 0, 0, ROWS_PER_BATCH - len(text))
        logits = model(F.pad(text, padding), F.pad(image, padding)).image[: len(text)].float()
        parts.append(logits.log_softmax(-1).gather(2, image.unsqueeze(2)).squeeze(2))
    return torch.cat(parts)


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
            f"num_candidates: got {num_candidates}, wanted a divisor of {len(scores)} scores"
        )
    best = scores.reshape(-1, num_candidates).argmax(dim=1)
    return best + torch.arange(len(best), device=scores.device) * num_candidates
