"""Log-likelihoods of images and captions under a decoder."""

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
    """Natural logarithms of what the decoder thinks of every image with every caption."""

    image_given_text: Float[Tensor, "images captions"]
    """log p(image | caption)."""
    text: Float[Tensor, " captions"] | None
    """log p(caption); None of a model that does not write captions."""
    image: Float[Tensor, " images"]
    """log p(image), under the null caption."""

    def probabilities(self, *, use_prior: bool = False) -> Float[Tensor, "images captions"]:
        """Compute p(caption | image), as if each image had one of these captions.

        Args:
            use_prior: Weigh captions by p(caption); otherwise all are equally likely beforehand.

        Returns:
            Probabilities; each row sums to one.

        Raises:
            ValueError: If captions shall be weighed by what the model does not know.
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
    """Score every image with every caption: one row of the decoder for each pair.

    Args:
        model: In evaluation mode.
        text_token_ids: Captions, padded; at least one.
        image_token_ids: Images, raster order; at least one.

    Returns:
        The scores.
    """
    null = torch.full_like(text_token_ids[:1], PAD_TOKEN_ID)
    text = torch.cat([text_token_ids, null])
    scores = torch.stack(
        [
            image_log_likelihood(model, text, image.expand(len(text), -1))
            for image in image_token_ids
        ]
    )
    return PairScores(
        image_given_text=scores[:, :-1],
        text=text_log_likelihood(model, text_token_ids) if isinstance(model, Dalle) else None,
        image=scores[:, -1],
    )


@torch.inference_mode()
def text_log_likelihood(
    model: Dalle, text_token_ids: Int[Tensor, "batch text_length"]
) -> Float[Tensor, " batch"]:
    """Compute log p(caption): the probability that a caption begins like this.

    Args:
        model: In evaluation mode.
        text_token_ids: Captions, padded; pads count nothing.

    Returns:
        Natural logarithms, summed over the caption's tokens.
    """
    sums = []
    for start in range(0, len(text_token_ids), ROWS_PER_BATCH):
        text = text_token_ids[start : start + ROWS_PER_BATCH]
        # Always as many rows: a caption's score must not depend on what is scored beside it.
        padded = F.pad(text, (0, 0, 0, ROWS_PER_BATCH - len(text)))
        logits = model.predict_text(padded)[: len(text)].float()
        logs = logits.log_softmax(-1).gather(2, text.unsqueeze(2)).squeeze(2)
        sums.append(logs.masked_fill(text == PAD_TOKEN_ID, 0).sum(dim=1))
    return torch.cat(sums)


@torch.inference_mode()
def log_likelihood_ratio(
    model: TextToImageModel,
    text_token_ids: Int[Tensor, "batch text_length"],
    image_token_ids: Int[Tensor, "batch image_length"],
) -> Float[Tensor, " batch"]:
    """Measure how much likelier the caption makes each image.

    This is log p(image | text) - log p(image), the pointwise mutual information of image and
    caption: unlike log p(image | text) it does not favour images that are plain.

    Args:
        model: In evaluation mode.
        text_token_ids: Captions, padded.
        image_token_ids: One image per caption.

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
        image_token_ids: One image per caption.

    Returns:
        Natural logarithms, summed over the image's tokens.
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
        image_token_ids: One image per caption.

    Returns:
        Natural logarithms.
    """
    parts = []
    for start in range(0, len(text_token_ids), ROWS_PER_BATCH):
        text, image = (
            ids[start : start + ROWS_PER_BATCH] for ids in (text_token_ids, image_token_ids)
        )
        # Always as many rows: an image's score must not depend on what is scored beside it.
        padding = (0, 0, 0, ROWS_PER_BATCH - len(text))
        logits = model(F.pad(text, padding), F.pad(image, padding)).image[: len(text)].float()
        parts.append(logits.log_softmax(-1).gather(2, image.unsqueeze(2)).squeeze(2))
    return torch.cat(parts)
