"""Captions for images: the likeliest of a list, or of the decoder's own."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle_mini_impl.cli.arguments import (
    OneLineParser,
    read_lines,
    require_at_least,
    user_path,
    user_text,
)
from dalle_mini_impl.cli.main import COMMANDS
from dalle_mini_impl.errors import UserError

if TYPE_CHECKING:
    from dalle_mini_impl.models.dalle import Dalle
    from dalle_mini_impl.pipeline import TextToImagePipeline


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(description=COMMANDS["caption"])
    add = parser.add_argument
    add("--model", type=user_text, required=True, help="model folder that train_dalle.py wrote")
    add("--images", type=user_path, nargs="+", default=[], help="images to caption")
    add("--caption", action="append", default=[], help="a candidate; may be given several times")
    add("--captions-file", type=user_path, help="text file with one candidate per line")
    add("--complete", metavar="START", help="complete a caption; '' starts from nothing")
    add("--num-samples", type=int, default=16, help="captions that --complete samples")
    add("--num-tokens", type=int, default=8, help="tokens that --complete adds")
    add("--seed", type=int, default=0, help="of --complete")
    add("--use-prior", action="store_true", help="prefer captions that are frequent in training")
    add("--top", type=int, default=5, help="captions named per image")
    add("--evaluate", choices=("emoji", "shapes"), help="zero-shot accuracy on held-out images")
    add("--data", type=user_path, default="out/demo/data", help="emoji folder for --evaluate")
    add("--language", choices=("en", "ko"), default="en", help="of the emoji captions")
    add("--style", default="twemoji", help="of the emoji")
    add("--num-images", type=int, default=200, help="for --evaluate, at most")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Write JSON to stdout: one line per image, caption or measurement."""
    options = parse(arguments)
    own = ("images", "caption", "captions_file", "complete")
    given = [name for name in own if getattr(options, name) not in (None, [])]
    if options.evaluate and given:
        raise UserError(
            f"evaluate: got {options.evaluate} with {', '.join(given)}, expected none of them: its "
            "images and captions are those of the data set"
        )
    # After parsing: --help and bad options need not wait for torch.
    from dalle_mini_impl.cli.pipelines import open_pipeline

    captions = list(options.caption)
    if options.captions_file:
        captions += read_lines(options.captions_file, field="captions-file")
    pipeline = open_pipeline(options.model)
    if options.evaluate:
        rows: Any = _zero_shot(pipeline, options)
    else:
        completed = []
        if options.complete is not None:
            completed = complete_captions(
                pipeline,
                options.complete,
                num_samples=options.num_samples,
                num_tokens=options.num_tokens,
                seed=options.seed,
            )
            captions += prefixes(completed, options.complete)
        rows = completed
        # Without images, the completions are the result.
        if options.images or not completed:
            rows = caption_images(
                pipeline, options.images, captions, use_prior=options.use_prior, top=options.top
            )
    # Characters that the output encoding lacks are JSON-escaped.
    is_ascii = sys.stdout.encoding.lower() not in ("utf-8", "utf8")
    for row in rows:
        sys.stdout.write(json.dumps(row, ensure_ascii=is_ascii) + "\n")


def _zero_shot(
    pipeline: "TextToImagePipeline", options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    from dalle_mini_impl.evaluation.zero_shot import zero_shot_emoji, zero_shot_shapes

    if options.evaluate == "emoji":
        words = {"language": options.language, "style": options.style}
        report = zero_shot_emoji(pipeline, options.data, num_images=options.num_images, **words)
        yield dataclasses.asdict(report)
        return
    for split in ("test", "test_compose"):
        report = zero_shot_shapes(pipeline, split=split, num_images=options.num_images)
        yield {"split": split, **dataclasses.asdict(report)}


def complete_captions(
    pipeline: "TextToImagePipeline", start: str, *, num_samples: int, num_tokens: int, seed: int = 0
) -> list[str]:
    """Complete a caption in the words of the training captions.

    Args:
        pipeline: The model.
        start: The beginning; may be empty.
        num_samples: Captions; the first takes the likeliest tokens, the others are sampled.
        num_tokens: Tokens that each grows by; a caption has no end of its own.
        seed: Of the first sampled one.
    """
    import torch

    from dalle_mini_impl.sampling.captioning import complete_text

    require_at_least(1, num_samples=num_samples, num_tokens=num_tokens)
    text_tokenizer, device = pipeline.text_tokenizer, pipeline.device
    if num_tokens > text_tokenizer.text_length:
        raise UserError(
            f"num_tokens: got {num_tokens}, expected at most the model's "
            f"{text_tokenizer.text_length}"
        )
    # The last seed, too, must fit into 64 bits.
    if not 0 <= seed < 2**63 - num_samples:
        raise UserError(f"seed: got {seed}, expected 0 to 2 ** 63 - {num_samples + 1}")
    dalle = _caption_decoder(pipeline, "complete")
    # The tokenizer refuses empty captions, but completing may start from nothing.
    null = text_tokenizer.null_text_token_ids().unsqueeze(0)
    prefix = (text_tokenizer.encode([start]) if start.strip() else null).to(device)
    # The first without seeds: always the likeliest token.
    rows = [complete_text(dalle, prefix, num_tokens=num_tokens)]
    if num_samples > 1:
        seeds = torch.arange(seed, seed + num_samples - 1)
        prefix = prefix.expand(len(seeds), -1)
        rows.append(complete_text(dalle, prefix, num_tokens=num_tokens, seeds=seeds))
    captions = text_tokenizer.decode(torch.cat(rows))
    # Tokens may be parts of a letter, and a caption may begin or end within one.
    return list(dict.fromkeys(text.strip("\N{REPLACEMENT CHARACTER}") for text in captions))


def _caption_decoder(pipeline: "TextToImagePipeline", option: str) -> "Dalle":
    """Return the decoder if it predicts captions; refuse the option otherwise."""
    from dalle_mini_impl.models.dalle import Dalle

    if isinstance(pipeline.dalle, Dalle):
        return pipeline.dalle
    raise UserError(
        f"{option}: this model reads captions and writes none (its decoder.architecture is "
        f"{pipeline.dalle.config.decoder.architecture}); expected decoder_only"
    )


def prefixes(captions: Sequence[str], start: str) -> list[str]:
    """List all different word prefixes of captions, from ``start`` to each whole caption."""
    # The decoder has no end-of-caption token, so each prefix is a candidate and ranking decides.
    shortest = max(len(start.split()), 1)
    found = [start] if start.strip() else []
    for words in map(str.split, captions):
        found += [" ".join(words[:count]) for count in range(shortest, len(words) + 1)]
    # In order of first appearance, so that equal runs print equal lines.
    return list(dict.fromkeys(found))


def caption_images(
    pipeline: "TextToImagePipeline",
    images: Sequence[Path],
    captions: Sequence[str],
    *,
    use_prior: bool = False,
    top: int = 5,
) -> Iterator[dict[str, Any]]:
    """Rank captions for each image file, weighed by p(caption) with ``use_prior``.

    Yields:
        Path of an image and its ``top`` best captions, each with its probability among the
        candidates and, in nats, log p(image | caption), log p(image | caption) - log p(image),
        which compares images, and log p(caption), None if the model predicts no captions.
    """
    from dalle_mini_impl.data.images import read_image_file
    from dalle_mini_impl.sampling.likelihood import score_pairs

    if not images:
        raise UserError("images: none given; expected --images, --complete or --evaluate")
    unique = list(dict.fromkeys(captions))
    if not unique:
        raise UserError("caption: none given; expected --caption, --captions-file or --complete")
    require_at_least(1, top=top)
    if use_prior:
        _caption_decoder(pipeline, "use_prior")
    # All of them first: a bad file is found before minutes are spent on the others.
    loaded = [read_image_file(path, field="images") for path in images]
    text_token_ids = pipeline.text_tokenizer.encode(unique).to(pipeline.device)
    for path, image in zip(images, loaded, strict=True):
        scores = score_pairs(pipeline.dalle, text_token_ids, pipeline.encode([image]))
        probabilities = scores.probabilities(use_prior=use_prior)[0]
        # p(image) is the same for every caption, but not for every image.
        ratios = scores.image_given_text[0] - scores.image[0]
        # Stable: captions of equal probability keep the order in which they were given.
        best = probabilities.argsort(descending=True, stable=True)[:top].tolist()
        rows = []
        for index in best:
            text_nats = None if scores.text is None else round(float(scores.text[index]), 2)
            rows.append(
                {
                    "caption": unique[index],
                    "probability": round(float(probabilities[index]), 4),
                    "image_nats": round(float(scores.image_given_text[0, index]), 2),
                    "log_likelihood_ratio_nats": round(float(ratios[index]), 2),
                    "text_nats": text_nats,
                }
            )
        yield {"image": str(path), "captions": rows}
