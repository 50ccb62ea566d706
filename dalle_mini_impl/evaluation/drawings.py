"""What a model draws for an evaluation: tokens of several candidates per caption."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle_mini_impl.evaluation.samples import Show
from dalle_mini_impl.pipeline import TextToImagePipeline
from dalle_mini_impl.sampling.generate import ROWS_PER_BATCH, generate_image_token_ids
from dalle_mini_impl.sampling.rerank import caption_gain
from dalle_mini_impl.sampling.sampler import SamplingConfig
from dalle_mini_impl.waiting import show_now_and_then


@dataclass(frozen=True)
class Drawings:
    """Tokens that a model drew, several candidates per caption."""

    image_token_ids: Int[Tensor, "captions candidates image_length"]
    gains: Float[Tensor, "captions candidates"]
    """Caption gain of each candidate in nats; zeros where there is one only."""

    @property
    def first(self) -> Int[Tensor, "captions image_length"]:
        """The first candidates: pictures that nobody chose."""
        return self.image_token_ids[:, 0]

    @property
    def best(self) -> Int[Tensor, "captions image_length"]:
        """The candidates with the largest gain."""
        return self.image_token_ids[torch.arange(len(self.gains)), self.gains.argmax(dim=1)]


@torch.inference_mode()
def draw(
    pipeline: TextToImagePipeline,
    captions: Sequence[str],
    *,
    settings: SamplingConfig,
    num_candidates: int = 1,
    seed: int = 0,
    show: Show = lambda line: None,
) -> Drawings:
    """Draw candidates for every caption, each with a seed of its own.

    The first candidate of caption i has seed ``seed + i``, however many others there are, so that
    ``pipeline(caption, seed=seed + i)`` shows the same picture.

    Args:
        pipeline: The model.
        captions: What to draw.
        settings: How.
        num_candidates: Pictures per caption.
        seed: Of the first picture.
        show: Receives lines about the progress.

    Returns:
        The tokens, on the CPU.

    Raises:
        UserError: If a number is out of range.
    """
    count = len(captions)
    pipeline.check(captions, num_images=count, num_candidates=num_candidates, seed=seed)
    device = pipeline.dalle.image_head.rows.device
    text = pipeline.captions.encode(list(captions)).to(device)
    progress = show_now_and_then(show, "pictures drawn")
    columns = []
    for candidate in range(num_candidates):
        seeds = torch.arange(count) + seed + candidate * count
        parts = []
        for rows in torch.arange(count).split(ROWS_PER_BATCH):
            drawn = generate_image_token_ids(
                pipeline.native or pipeline.dalle,
                text[rows.to(device)],
                seeds=seeds[rows],
                settings=settings,
            )
            gains = drawn.caption_gain
            if num_candidates > 1 and settings.guidance_scale == 1.0:
                gains = caption_gain(pipeline.dalle, text[rows.to(device)], drawn.image_token_ids)
            parts.append((drawn.image_token_ids.cpu(), gains.float().cpu()))
            progress(candidate * count + int(rows[-1]) + 1, num_candidates * count)
        columns.append([torch.cat(part) for part in zip(*parts, strict=True)])
    return Drawings(
        torch.stack([tokens for tokens, _ in columns], dim=1),
        torch.stack([gains for _, gains in columns], dim=1),
    )
