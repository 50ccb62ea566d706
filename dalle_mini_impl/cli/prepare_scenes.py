"""Write a data set of scenes: things in all colors."""

import argparse
import logging
from collections.abc import Sequence

from dalle_mini_impl.cli.arguments import OneLineParser, require_at_least, user_path
from dalle_mini_impl.cli.main import COMMANDS

logger = logging.getLogger(__name__)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    from dalle_mini_impl.builtin_datasets.emoji.styles import STYLES
    from dalle_mini_impl.builtin_datasets.scenes import DEFAULT_KINDS, KINDS

    parser = OneLineParser(description=COMMANDS["prepare_scenes"])
    add = parser.add_argument
    add("--out", type=user_path, required=True, help="folder to write")
    add("--size", type=int, default=64, help="side in pixels (default: 64)")
    add("--train", type=int, default=20_000, help="images (default: 20000)")
    add("--test", type=int, default=256, help="images of each held-out split (default: 256)")
    add("--kinds", nargs="+", choices=KINDS, default=DEFAULT_KINDS, help="default: all but large")
    add("--things", type=int, help="how many, the easiest to tell apart first (default: all)")
    add("--styles", nargs="+", choices=STYLES, default=["twemoji"], help="default: twemoji")
    add("--npm-dir", type=user_path, help="folder with unpacked npm packages (noto, fluent)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Write the data set and log its counts."""
    options = parse(arguments)
    require_at_least(0, train=options.train, test=options.test)
    require_at_least(2, things=options.things)
    from dalle_mini_impl.builtin_datasets.scenes.captions import prepare_scenes
    from dalle_mini_impl.builtin_datasets.scenes.scene import TASKS

    counts = {"train": options.train}
    # Without pairs in training, none are asked for.
    shown = {"single" if kind == "large" else kind for kind in options.kinds}
    tasks = [task for task, kind in TASKS.items() if kind in shown]
    counts |= {f"test_{task}": options.test for task in tasks}
    total = prepare_scenes(
        options.out,
        counts=counts,
        image_size=options.size,
        kinds=options.kinds,
        styles=options.styles,
        num_things=options.things,
        npm_dir=options.npm_dir,
    )
    listed = ", ".join(f"{split} {count}" for split, count in counts.items())
    logger.info(
        f"{options.out}: {total} images of {options.size} x {options.size}\n  per split: {listed}"
    )
