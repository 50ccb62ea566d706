"""Measure a model on held-out images."""

import argparse
import logging
from collections.abc import Sequence

from dalle_mini_impl.cli.arguments import OneLineParser, add_native, user_path, user_text
from dalle_mini_impl.cli.generate import sampling_overrides
from dalle_mini_impl.cli.main import COMMANDS

logger = logging.getLogger(__name__)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(description=COMMANDS["evaluate"])
    add = parser.add_argument
    add("--model", type=user_text, required=True, help="model folder that train_dalle.py wrote")
    add("--data", type=user_text, default="out/demo/data", help="emoji, shapes, scenes, any")
    add("--out", type=user_path, default="out/evaluation", help="report's folder")
    add("--style", nargs="+", default=[], help="of emoji to generate (default: all)")
    add("--language", choices=("en", "ko"), default="en", help="of the captions")
    add("--num-candidates", type=int, default=1, help="if over 1, also judge the best of N")
    add("--seed", type=int, default=0, help="seed of all randomness")
    add("--max-samples", type=int, default=512, help="images per style or split (default: 512)")
    add("--guidance-scale", type=float, help="strength of the caption; 1 = off")
    add("--temperature", type=float, help="below 1: more conservative")
    add_native(parser)
    add("--rank", choices=("likelihood", "clip", "none"), default="likelihood", help="ranked by")
    add("--clip", type=user_text, help="folder or name of a CLIP, for its score and --rank clip")
    add(
        "--wandb",
        choices=("auto", "online", "offline", "disabled"),
        help="log the report to W&B (default: the mode of the model's training run, if any)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Write the report and say where it is."""
    options = parse(arguments)
    from dalle_mini_impl.cli.evaluation import EvaluationConfig, evaluate

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
            overrides=sampling_overrides(options),
            native=options.native,
            rank=options.rank,
            clip=options.clip,
            tracking=options.wandb,
        ),
    )
    logger.info(f"report: {report}, and {report.with_suffix('.json').name} next to it")
