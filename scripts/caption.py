"""Caption images: python scripts/caption.py --model DIR --images a.png --complete "a red"."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dalle_mini_impl.cli.main import OneLineParser, run_script


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(
        description="Say which caption fits an image, by the model that generates."
    )
    add = parser.add_argument
    add("--model", required=True, help="model folder that train_dalle.py wrote")
    add("--images", type=Path, nargs="+", default=[], help="images to caption")
    add("--caption", action="append", default=[], help="a candidate; may be given several times")
    add("--captions-file", type=Path, help="text file with one candidate per line")
    add("--complete", metavar="START", help="go on with a caption; '' starts from nothing")
    add("--num-samples", type=int, default=16, help="captions that --complete makes")
    add("--num-tokens", type=int, default=8, help="tokens that --complete adds")
    add("--seed", type=int, default=0, help="of --complete")
    add("--use-prior", action="store_true", help="prefer captions that are frequent in training")
    add("--top", type=int, default=5, help="captions named per image")
    add("--evaluate", choices=("emoji", "shapes"), help="zero-shot accuracy on held-out images")
    add("--data", type=Path, default=Path("out/demo/data"), help="emoji folder for --evaluate")
    add("--language", choices=("en", "ko"), default="en", help="of the emoji captions")
    add("--style", default="twemoji", help="of the emoji")
    add("--num-images", type=int, default=200, help="for --evaluate, at most")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Print JSON, one line per image, caption or measurement."""
    options = parse(arguments)
    from dalle_mini_impl.cli.caption import caption_images, complete_captions, prefixes
    from dalle_mini_impl.cli.generate import read_prompts
    from dalle_mini_impl.evaluation.zero_shot import zero_shot_emoji, zero_shot_shapes
    from dalle_mini_impl.hardware import use_fast_float32
    from dalle_mini_impl.pipeline import TextToImagePipeline

    more = read_prompts(options.captions_file) if options.captions_file else []
    captions = [*options.caption, *more]
    use_fast_float32()
    pipeline = TextToImagePipeline.from_pretrained(options.model)
    if options.evaluate == "emoji":
        words = {"language": options.language, "style": options.style}
        report = zero_shot_emoji(pipeline, options.data, num_images=options.num_images, **words)
        print(json.dumps(dataclasses.asdict(report)))
    elif options.evaluate == "shapes":
        for split in ("test", "test_compose"):
            report = zero_shot_shapes(pipeline, split=split, num_images=options.num_images)
            print(json.dumps({"split": split, **dataclasses.asdict(report)}))
    else:
        longer = []
        if options.complete is not None:
            sizes = {"num_samples": options.num_samples, "num_tokens": options.num_tokens}
            longer = complete_captions(pipeline, options.complete, seed=options.seed, **sizes)
            captions += prefixes(longer, options.complete)
        choice = {"use_prior": options.use_prior, "top": options.top}
        ranks = options.images or not longer
        rows = caption_images(pipeline, options.images, captions, **choice) if ranks else longer
        for line in rows:
            print(json.dumps(line, ensure_ascii=False))


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
