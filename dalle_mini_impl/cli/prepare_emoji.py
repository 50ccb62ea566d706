"""Write the emoji data set."""

import argparse
import logging
from collections.abc import Sequence

from dalle_mini_impl.cli.arguments import OneLineParser, user_path
from dalle_mini_impl.cli.main import COMMANDS

logger = logging.getLogger(__name__)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    from dalle_mini_impl.builtin_datasets.emoji.styles import STYLES

    parser = OneLineParser(description=COMMANDS["prepare_emoji"])
    add = parser.add_argument
    add("--out", type=user_path, required=True, help="folder to write")
    add("--size", type=int, default=64, help="side length in pixels (default: 64)")
    add("--styles", nargs="+", choices=STYLES, default=["twemoji"], help="default: twemoji")
    add("--npm-dir", type=user_path, help="folder with unpacked npm packages (noto, fluent)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Write the data set and log its counts."""
    options = parse(arguments)
    from dalle_mini_impl.builtin_datasets.emoji.prepare import prepare_emoji

    report = prepare_emoji(
        options.out, size=options.size, styles=options.styles, npm_dir=options.npm_dir
    )
    lines = [f"{options.out}: {report.images} images of {options.size} x {options.size}"]
    for name, counts in (("split", report.splits), ("style", report.styles)):
        listed = ", ".join(f"{key} {count}" for key, count in sorted(counts.items()))
        lines.append(f"  per {name}: {listed}")
    lines.append(
        f"  left out: {report.identical} identical, {report.unnamed} without a name; "
        f"moved to train: {report.moved_to_train} nearly identical, "
        f"of which left out: {report.inconsistent} (held out in another style)"
    )
    logger.info("\n".join(lines))
