"""Write a data set of the shapes world."""

import argparse
import logging
from collections.abc import Sequence

from dalle_mini_impl.cli.arguments import OneLineParser, require_at_least, user_path
from dalle_mini_impl.cli.main import COMMANDS

logger = logging.getLogger(__name__)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    from dalle_mini_impl.builtin_datasets.shapes.scene import KINDS

    parser = OneLineParser(description=COMMANDS["prepare_shapes"])
    add = parser.add_argument
    add("--out", type=user_path, required=True, help="folder to write")
    add("--size", type=int, default=32, help="side in pixels (default: 32)")
    add("--train", type=int, default=20_000, help="images (default: 20000)")
    add("--test", type=int, default=1_000, help="images (default: 1000)")
    add("--test-compose", type=int, default=1_000, help="images (default: 1000)")
    add("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of scene (default: all)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Write the data set and log its counts."""
    options = parse(arguments)
    from dalle_mini_impl.builtin_datasets.shapes.captions import prepare_shapes

    counts = {split: getattr(options, split) for split in ("train", "test", "test_compose")}
    require_at_least(0, **counts)
    total = prepare_shapes(options.out, counts=counts, image_size=options.size, kinds=options.kinds)
    listed = ", ".join(f"{split} {count}" for split, count in counts.items())
    logger.info(
        f"{options.out}: {total} images of {options.size} x {options.size}\n  per split: {listed}"
    )
