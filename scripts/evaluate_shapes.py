"""Check drawings of shapes: python scripts/evaluate_shapes.py --model out/shapes/dalle/model."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dalle_mini_impl.cli import OneLineParser, run_script
from dalle_mini_impl.data.shapes import KINDS

SPLITS = ("test", "test_compose")
NUM_SHOWN = 32


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(description="Check a model's drawings of captions of the shapes world.")
    parser.add_argument("--model", required=True, help="model folder that train_dalle.py wrote")
    parser.add_argument("--num-captions", type=int, default=512, help="of each split")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes and the drawings")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=["single"], help="as in the training data"
    )
    parser.add_argument(
        "--num-candidates", type=int, default=1, help="draw this many, keep the best"
    )
    parser.add_argument("--guidance-scale", type=float, help="strength of the caption; 1 = off")
    parser.add_argument("--temperature", type=float, help="below 1 plays safe")
    parser.add_argument("--out", type=Path, help="folder for a PNG of each split's first drawings")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Print the shares of right drawings as JSON, one line per split."""
    options = parse(arguments)
    from dalle_mini_impl.evaluation.shapes_accuracy import drawings_sheet, evaluate_shapes
    from dalle_mini_impl.folders import make_folder
    from dalle_mini_impl.pipeline import TextToImagePipeline
    from dalle_mini_impl.training.precision import use_fast_float32

    use_fast_float32()
    if options.out:
        make_folder(options.out, field="out")
    pipeline = TextToImagePipeline.from_pretrained(options.model)
    overrides = {name: getattr(options, name) for name in ("guidance_scale", "temperature")}
    for split in SPLITS:
        report = evaluate_shapes(
            pipeline,
            split=split,
            num_captions=options.num_captions,
            seed=options.seed,
            kinds=options.kinds,
            num_candidates=options.num_candidates,
            **{name: value for name, value in overrides.items() if value is not None},
        )
        figures = {"accuracy": report.accuracy, "accuracy_of_shuffled": report.shuffled_accuracy}
        print(json.dumps({"split": split, **figures, "facts": report.fact_accuracies}))
        if options.out:
            drawings_sheet(report, NUM_SHOWN).save(options.out / f"{split}.png")


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
