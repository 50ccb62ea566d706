"""Log-likelihoods of images and captions under a decoder, in nats."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from dalle_mini_impl.models.dalle import Dalle
from dalle_mini_impl.models.dalle_config import PAD_TOKEN_ID
from dalle_mini_impl.models.text_to_image import TextToImageModel
from dalle_mini_impl.sampling.generate import ROWS_PER_BATCH


class PairScores(NamedTuple):
    """Log-likelihoods of every image with every caption."""

    image_given_text: Float[Tensor, "images captions"]
    """log p(image | caption)."""
    text: Float[Tensor, " captions"] | None
    """log p(caption); None from a model that does not predict captions."""
    image: Float[Tensor, " images"]
    """log p(image), under the null caption."""

    def probabilities(self, *, use_prior: bool = False) -> Float[Tensor, "images captions"]:
        """Compute p(caption | image), as if each image had exactly one of these captions.

        With ``use_prior`` captions are weighted by p(caption), which only a model that predicts
        captions knows (else ValueError); otherwise all have the same prior.
        """
        if not use_prior:
            return self.image_given_text.softmax(dim=1)
        if self.text is None:
            raise ValueError("use_prior: got True, expected False: this model writes no captions")
        return (self.image_given_text + self.text).softmax(dim=1)


@torch.inference_mode()
def score_pairs(
    model: TextToImageModel,
    text_token_ids: Int[Tensor, "captions text_length"],
    image_token_ids: Int[Tensor, "images image_length"],
) -> PairScores:
    """Score every image with every caption: one row of the decoder for each pair."""
    # The null caption is one more caption, whose column is log p(image).
    null = torch.full_like(text_token_ids[:1], PAD_TOKEN_ID)
    text = torch.cat([text_token_ids, null])
    scores = torch.stack(
        [
            image_log_likelihood(model, text, image.expand(len(text), -1))
            for image in image_token_ids
        ]
    )  # (images, captions + 1)
    return PairScores(
        image_given_text=scores[:, :-1],
        text=text_log_likelihood(model, text_token_ids) if isinstance(model, Dalle) else None,
        image=scores[:, -1],
    )


@torch.inference_mode()
def log_likelihood_ratio(
    model: TextToImageModel,
    text_token_ids: Int[Tensor, "batch text_length"],
    image_token_ids: Int[Tensor, "batch image_length"],
) -> Float[Tensor, " batch"]:
    """Compute log p(image | text) - log p(image), how much likelier the caption makes each image.

    It is the pointwise mutual information of image and caption: unlike log p(image | text) it does
    not favor plain images.
    """
    null = torch.full_like(text_token_ids, PAD_TOKEN_ID)
    given_text = image_log_likelihood(model, text_token_ids, image_token_ids)
    return given_text - image_log_likelihood(model, null, image_token_ids)


@torch.inference_mode()
def image_log_likelihood(
    model: TextToImageModel,
    text_token_ids: Int[Tensor, "batch text_length"],
    image_token_ids: Int[Tensor, "batch image_length"],
) -> Float[Tensor, " batch"]:
    """Compute log p(image | text) of each pair; a row of pads gives log p(image)."""
    return image_token_log_likelihoods(model, text_token_ids, image_token_ids).sum(dim=1)


@torch.inference_mode()
def image_token_log_likelihoods(
    model: TextToImageModel,
    text_token_ids: Int[Tensor, "batch text_length"],
    image_token_ids: Int[Tensor, "batch image_length"],
) -> Float[Tensor, "batch image_length"]:
    """Compute log p of each image token, given the caption and the tokens before it."""
    parts = []
    for start in range(0, len(text_token_ids), ROWS_PER_BATCH):
        text = text_token_ids[start : start + ROWS_PER_BATCH]
        image = image_token_ids[start : start + ROWS_PER_BATCH]
        logits = model(_pad_rows(text), _pad_rows(image)).image[: len(text)].float()
        parts.append(logits.log_softmax(-1).gather(2, image.unsqueeze(2)).squeeze(2))
    return torch.cat(parts)


@torch.inference_mode()
def text_log_likelihood(
    model: Dalle, text_token_ids: Int[Tensor, "batch text_length"]
) -> Float[Tensor, " batch"]:
    """Compute log p of each caption as a prefix of any caption; pads do not count."""
    sums = []
    for start in range(0, len(text_token_ids), ROWS_PER_BATCH):
        text = text_token_ids[start : start + ROWS_PER_BATCH]
        # Pads are never predicted in training, so what follows a caption has no probability.
        logits = model.predict_text(_pad_rows(text))[: len(text)].float()
        logs = logits.log_softmax(-1).gather(2, text.unsqueeze(2)).squeeze(2)
        sums.append(logs.masked_fill(text == PAD_TOKEN_ID, 0).sum(dim=1))
    return torch.cat(sums)


def _pad_rows(token_ids: Tensor) -> Tensor:
    # One shape for all batches: the rest of a batch moves a score by rounding at most.
    return F.pad(token_ids, (0, 0, 0, ROWS_PER_BATCH - len(token_ids)))
