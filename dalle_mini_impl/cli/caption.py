"""``caption.py``: rank captions for images, given ones or ones that the decoder writes."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dalle_mini_impl.data.images import read_image_file
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.models.dalle import Dalle
from dalle_mini_impl.pipeline import TextToImagePipeline
from dalle_mini_impl.sampling.captioning import complete_text
from dalle_mini_impl.sampling.likelihood import score_pairs


def complete_captions(
    pipeline: TextToImagePipeline, start: str, *, num_samples: int, num_tokens: int, seed: int = 0
) -> list[str]:
    """Continue a caption in the words of the training captions.

    Args:
        pipeline: The model.
        start: The beginning; may be empty.
        num_samples: The first caption is greedy (the likeliest token each time), the others are
            sampled.
        num_tokens: Tokens to add to each; the model has no token for the end of a caption.
        seed: Of the first sampled caption.

    Returns:
        Different captions, in that order.

    Raises:
        UserError: If a number is out of range.
    """
    for name, count in (("num_samples", num_samples), ("num_tokens", num_tokens)):
        if count < 1:
            raise UserError(f"{name}: got {count}, expected at least 1")
    longest = pipeline.text_tokenizer.text_length
    if num_tokens > longest:
        raise UserError(f"num_tokens: got {num_tokens}, expected at most the model's {longest}")
    if not 0 <= seed < 2**63 - num_samples:
        raise UserError(f"seed: got {seed}, expected 0 to 2 ** 63 - {num_samples + 1}")
    dalle = _writer_of_captions(pipeline, "complete")
    text_tokenizer, device = pipeline.text_tokenizer, pipeline.dalle.image_head.rows.device
    null = text_tokenizer.null_text_token_ids().unsqueeze(0)
    prefix = (text_tokenizer.encode([start]) if start.strip() else null).to(device)
    # The greedy caption first: it is the same for every seed.
    rows = [complete_text(dalle, prefix, num_tokens=num_tokens)]
    if num_samples > 1:
        seeds = torch.arange(seed, seed + num_samples - 1)
        sampled = prefix.expand(len(seeds), -1)  # (samples, text_length)
        rows.append(complete_text(dalle, sampled, num_tokens=num_tokens, seeds=seeds))
    written = text_tokenizer.decode(torch.cat(rows))
    # Byte-level tokens may split a character at either end of a caption.
    return list(dict.fromkeys(text.strip("\N{REPLACEMENT CHARACTER}") for text in written))


def _writer_of_captions(pipeline: TextToImagePipeline, option: str) -> Dalle:
    """Return the decoder if it predicts captions; refuse the option otherwise."""
    if isinstance(pipeline.dalle, Dalle):
        return pipeline.dalle
    raise UserError(
        f"{option}: this model reads captions and writes none (its decoder.architecture is "
        f"{pipeline.dalle.config.decoder.architecture}); expected decoder_only"
    )


def prefixes(captions: Sequence[str], start: str) -> list[str]:
    """List all different word prefixes of captions, from ``start`` to each whole caption."""
    # The decoder has no end-of-caption token, so each beginning is a candidate and ranking decides.
    least = max(len(start.split()), 1)
    every = [
        " ".join(words[:count])
        for words in map(str.split, captions)
        for count in range(least, len(words) + 1)
    ]
    return list(dict.fromkeys([start, *every] if start.strip() else every))


def caption_images(
    pipeline: TextToImagePipeline,
    images: Sequence[Path],
    captions: Sequence[str],
    *,
    use_prior: bool = False,
    top: int = 5,
) -> Iterator[dict[str, Any]]:
    """Rank captions for each image.

    Args:
        pipeline: The model.
        images: Image files.
        captions: Candidates; repeated ones count once.
        use_prior: Weight them by p(caption).
        top: Captions per image.

    Yields:
        The path of an image and its best captions. Each has its probability among the candidates
        and, in nats, log p(image | caption), the ratio log p(image | caption) - log p(image), which
        compares images, and log p(caption): None for a model that writes no captions.

    Raises:
        UserError: If there is no image or no caption, one is empty, or an image cannot be read.
    """
    if not images:
        raise UserError("images: none given; expected --images, --complete or --evaluate")
    unique = list(dict.fromkeys(captions))
    if not unique:
        raise UserError("caption: none given; expected --caption, --captions-file or --complete")
    if top < 1:
        raise UserError(f"top: got {top}, expected at least 1")
    if use_prior:
        _writer_of_captions(pipeline, "use_prior")
    # All images first: a bad one is reported before any is captioned.
    loaded_images = [read_image_file(path, field="images") for path in images]
    text_token_ids = pipeline.text_tokenizer.encode(unique).to(
        pipeline.dalle.image_head.rows.device
    )
    # One image at a time: a pass of the decoder has a row for each candidate.
    for path, image in zip(images, loaded_images, strict=True):
        scores = score_pairs(pipeline.dalle, text_token_ids, pipeline.encode([image]))
        probabilities = scores.probabilities(use_prior=use_prior)[0]
        best = probabilities.argsort(descending=True, stable=True)[:top].tolist()
        yield {
            "image": str(path),
            "captions": [
                {
                    "caption": unique[index],
                    "probability": round(float(probabilities[index]), 4),
                    "image_nats": round(float(scores.image_given_text[0, index]), 2),
                    "log_likelihood_ratio_nats": round(
                        float(scores.image_given_text[0, index] - scores.image[0]), 2
                    ),
                    "text_nats": (
                        None if scores.text is None else round(float(scores.text[index]), 2)
                    ),
                }
                for index in best
            ],
        }
