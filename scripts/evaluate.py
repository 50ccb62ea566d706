"""Measure a model on held-out images: python scripts/evaluate.py --model out/demo/dalle/model."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dalle_mini_impl.cli.main import OneLineParser, run_script


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(
        description="Measure a model on held-out images: report.md and report.json."
    )
    parser.add_argument("--model", required=True, help="model folder that train_dalle.py wrote")
    parser.add_argument("--data", default="out/demo/data", help="its data: emoji, shapes, any")
    parser.add_argument("--out", type=Path, default=Path("out/evaluation"), help="report's folder")
    parser.add_argument(
        "--style", nargs="+", default=[], help="of emoji to generate (default: all)"
    )
    parser.add_argument("--language", choices=("en", "ko"), default="en", help="of the captions")
    parser.add_argument(
        "--num-candidates", type=int, default=1, help="generate this many, judge the best as well"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument(
        "--max-samples", type=int, default=512, help="images per style or split (default: 512)"
    )
    parser.add_argument("--guidance-scale", type=float, help="strength of the caption; 1 = off")
    parser.add_argument("--temperature", type=float, help="below 1 plays safe")
    parser.add_argument(
        "--native",
        choices=("float32", "int8"),
        help="generate as compiled here, not torch; see guide",
    )
    parser.add_argument("--clip", help="folder or name of a CLIP, for the CLIP score")
    parser.add_argument(
        "--wandb",
        choices=("auto", "online", "offline", "disabled"),
        help="show the report in W&B (default: as the model's run, where it has one)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Write the report and say where it is."""
    options = parse(arguments)
    from dalle_mini_impl.cli.evaluation import EvaluationConfig, evaluate

    overrides = {name: getattr(options, name) for name in ("guidance_scale", "temperature")}
    report = evaluate(
        EvaluationConfig(
            model=options.model,
            data=options.data,
            out=options.out,
            styles=tuple(options.style),
            language=options.language,
            num_candidates=options.num_candidates,
            seed=options.seed,
            max_samples=options.max_samples,
            overrides={name: value for name, value in overrides.items() if value is not None},
            native=options.native,
            clip=options.clip,
            tracking=options.wandb,
        ),
    )
    print(f"report: {report}, and {report.with_suffix('.json').name} beside it")


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
