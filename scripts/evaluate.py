"""Measure a model on held-out emoji: python scripts/evaluate.py --model out/demo/dalle/model."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dalle_mini_impl.cli import OneLineParser, run_script
from dalle_mini_impl.errors import UserError


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(description="Measure a model on held-out emoji.")
    parser.add_argument("--model", required=True, help="model folder that train_dalle.py wrote")
    parser.add_argument("--data", type=Path, default=Path("out/demo/data"), help="emoji folder")
    parser.add_argument(
        "--num-candidates", type=int, default=1, help="draw this many, keep the best"
    )
    parser.add_argument("--seed", type=int, default=0, help="of every picture")
    parser.add_argument("--language", choices=("en", "ko"), default="en", help="of the captions")
    parser.add_argument("--style", default="twemoji", help="whose pictures are wanted")
    parser.add_argument("--guidance-scale", type=float, help="strength of the caption; 1 = off")
    parser.add_argument("--temperature", type=float, help="below 1 plays safe")
    parser.add_argument("--out", type=Path, help="PNG of the drawings beside the true pictures")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Print the figures as JSON."""
    options = parse(arguments)
    if options.out and options.out.suffix.lower() != ".png":
        raise UserError(f"out: got {options.out}, wanted a file name that ends in .png")
    from dalle_mini_impl.evaluation.demo import held_out_sheet
    from dalle_mini_impl.evaluation.emoji import evaluate_emoji
    from dalle_mini_impl.folders import make_folder
    from dalle_mini_impl.pipeline import TextToImagePipeline
    from dalle_mini_impl.training.precision import use_fast_float32

    use_fast_float32()
    if options.out:
        make_folder(options.out.parent, field="out")
    overrides = {name: getattr(options, name) for name in ("guidance_scale", "temperature")}
    figures, grid = evaluate_emoji(
        TextToImagePipeline.from_pretrained(options.model),
        options.data,
        num_candidates=options.num_candidates,
        seed=options.seed,
        language=options.language,
        style=options.style,
        **{name: value for name, value in overrides.items() if value is not None},
    )
    print(json.dumps(figures, indent=2))
    if options.out:
        held_out_sheet(grid).save(options.out)
        print(f"drawings: {options.out}")


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
