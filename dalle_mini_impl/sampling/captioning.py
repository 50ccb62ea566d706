"""Image to text: scoring and completing captions with the text-to-image decoder.

The decoder reads the caption first, so p(caption | image) follows from Bayes' rule: it is
proportional to p(image | caption) p(caption), and both are known. Over a list of captions this
captions an image and classifies it without any training for that (zero-shot classification).

Captions have no end token (pads are never predicted), so p(caption) is the probability that a
caption begins like this, which is smaller for longer ones. The default everywhere is therefore
p(image | caption) alone: all candidates are equally likely beforehand.

Source: Ramesh et al. 2021, arXiv:2102.12092, section 2 (one model of caption and image); Li et
al. 2023, arXiv:2303.16203 (zero-shot classification by likelihood; theirs is a bound, ours exact).
"""

import torch
from jaxtyping import Int
from torch import Tensor

from dalle_mini_impl.models.dalle import Dalle
from dalle_mini_impl.models.dalle_config import PAD_TOKEN_ID
from dalle_mini_impl.sampling.logits import gumbel_noise


@torch.inference_mode()
def complete_text(
    model: Dalle,
    text_token_ids: Int[Tensor, "batch text_length"],
    *,
    num_tokens: int,
    seeds: Int[Tensor, " batch"] | None = None,
) -> Int[Tensor, "batch text_length"]:
    """Continue captions by ``num_tokens`` tokens, or fewer where ``text_length`` ends.

    A row of pads starts from nothing, and no pad is added. ``seeds`` are one per row, in
    [0, 2 ** 63); None takes the likeliest token each time.
    """
    text = text_token_ids.clone()
    rows = torch.arange(len(text), device=text.device)
    ends = (text != PAD_TOKEN_ID).sum(dim=1)  # where the next token goes
    for _ in range(num_tokens):
        logits = model.predict_text(text).float()
        # Full rows are computed as well and written back unchanged.
        places = ends.clamp_max(text.shape[1] - 1)
        next_logits = logits[rows, places].log_softmax(-1)
        next_logits[:, PAD_TOKEN_ID] = float("-inf")
        if seeds is not None:
            steps = places.unsqueeze(1)
            next_logits = next_logits + gumbel_noise(
                seeds.to(text.device), steps=steps, vocab_size=next_logits.shape[1]
            )
        has_room = ends < text.shape[1]
        text[rows, places] = next_logits.argmax(dim=-1).where(has_room, text[rows, places])
        ends = ends + has_room
    return text
