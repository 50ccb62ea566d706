"""Write the emoji data set: python scripts/prepare_emoji.py --out out/emoji64/data [--size 64]."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dalle_mini_impl.cli.main import OneLineParser, run_script


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    from dalle_mini_impl.builtin_datasets.emoji.styles import STYLES

    parser = OneLineParser(description="Write emoji images and captions as an image folder.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--size", type=int, default=64, help="side length in pixels (default: 64)")
    parser.add_argument(
        "--styles", nargs="+", choices=STYLES, default=["twemoji"], help="default: twemoji"
    )
    parser.add_argument(
        "--npm-dir", type=Path, help="folder with unpacked npm packages (noto, fluent)"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Write the data set and print its counts."""
    options = parse(arguments)
    from dalle_mini_impl.builtin_datasets.emoji.prepare import prepare_emoji

    report = prepare_emoji(
        options.out, size=options.size, styles=options.styles, npm_dir=options.npm_dir
    )
    print(f"{options.out}: {report.images} images of {options.size} x {options.size}")
    for name, counts in (("split", report.splits), ("style", report.styles)):
        listed = ", ".join(f"{key} {count}" for key, count in sorted(counts.items()))
        print(f"  per {name}: {listed}")
    print(
        f"  left out: {report.identical} identical, {report.unnamed} without a name; "
        f"moved to train: {report.moved_to_train} nearly identical, "
        f"of which left out: {report.inconsistent} (held out in another style)"
    )


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
