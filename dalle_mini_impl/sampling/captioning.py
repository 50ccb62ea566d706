"""The other direction: which caption fits a picture, by the decoder that draws.

The decoder reads the caption first, so p(caption | image) follows from Bayes' rule: it is in
proportion to p(image | caption) p(caption), and both are at hand. Over a list of captions this
captions a picture and classifies it without any training for that (zero-shot classification).

Captions have no end mark (pads are never predicted), so p(caption) is the probability that a
caption begins so: of two captions the longer one has less of it. Where all candidates are equally
welcome, p(image | caption) alone is the better judge; it is the default everywhere here.

Source: Ramesh et al. 2021, arXiv:2102.12092, section 2 (one model of caption and picture); Li et
al. 2023, arXiv:2303.16203 (zero-shot classification by likelihood; theirs is a bound, ours exact).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from dalle_mini_impl.models.dalle import Dalle
from dalle_mini_impl.models.dalle_config import PAD_TOKEN_ID
from dalle_mini_impl.models.text_to_image import TextToImageModel
from dalle_mini_impl.sampling.generate import ROWS_PER_BATCH
from dalle_mini_impl.sampling.logits import gumbel_noise
from dalle_mini_impl.sampling.rerank import image_log_likelihood


class PairScores(NamedTuple):
    """Natural logarithms of what the decoder thinks of every picture with every caption."""

    image_given_text: Float[Tensor, "images captions"]
    """log p(image | caption)."""
    text: Float[Tensor, " captions"] | None
    """log p(caption); None of a model that does not write captions."""
    image: Float[Tensor, " images"]
    """log p(image), under the null caption."""

    def shares(self, *, use_prior: bool = False) -> Float[Tensor, "images captions"]:
        """Compute p(caption | image), as if each picture had one of these captions.

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
            raise ValueError("use_prior: got True, wanted False: this model writes no captions")
        return (self.image_given_text + self.text).softmax(dim=1)


@torch.inference_mode()
def score_pairs(
    model: TextToImageModel,
    text_token_ids: Int[Tensor, "captions text_length"],
    image_token_ids: Int[Tensor, "images image_length"],
) -> PairScores:
    """Score every picture with every caption: one row of the decoder for each pair.

    Args:
        model: In evaluation mode.
        text_token_ids: Captions, padded; at least one.
        image_token_ids: Pictures, raster order; at least one.

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
        # Always as many rows: what is scored beside a caption moves its score by rounding at most.
        padded = F.pad(text, (0, 0, 0, ROWS_PER_BATCH - len(text)))
        logits = model.predict_text(padded)[: len(text)].float()
        logs = logits.log_softmax(-1).gather(2, text.unsqueeze(2)).squeeze(2)
        sums.append(logs.masked_fill(text == PAD_TOKEN_ID, 0).sum(dim=1))
    return torch.cat(sums)


@torch.inference_mode()
def complete_text(
    model: Dalle,
    text_token_ids: Int[Tensor, "batch text_length"],
    *,
    num_tokens: int,
    seeds: Int[Tensor, " batch"] | None = None,
) -> Int[Tensor, "batch text_length"]:
    """Go on with captions from their beginnings.

    Args:
        model: In evaluation mode.
        text_token_ids: Beginnings, padded; a row of pads starts from nothing.
        num_tokens: Tokens that each caption grows by, or fewer where it gets too long.
        seeds: Of each row's draws, in [0, 2 ** 63); None takes the likeliest token each time.

    Returns:
        Longer captions, padded. None of the added tokens is a pad.
    """
    text = text_token_ids.clone()
    rows = torch.arange(len(text), device=text.device)
    ends = (text != PAD_TOKEN_ID).sum(dim=1)  # where the next token goes
    for _ in range(num_tokens):
        logits = model.predict_text(text).float()
        places = ends.clamp_max(text.shape[1] - 1)
        wanted = logits[rows, places].log_softmax(-1)
        wanted[:, PAD_TOKEN_ID] = float("-inf")
        if seeds is not None:
            steps = places.unsqueeze(1)
            wanted = wanted + gumbel_noise(
                seeds.to(text.device), steps=steps, vocab_size=wanted.shape[1]
            )
        has_room = ends < text.shape[1]
        text[rows, places] = wanted.argmax(dim=-1).where(has_room, text[rows, places])
        ends = ends + has_room
    return text
