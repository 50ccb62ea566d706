"""Write the emoji data set: python scripts/prepare_emoji.py --out data/emoji64 [--size 64]."""

import argparse
import sys
from pathlib import Path

from dalle_mini_impl.data.emoji import prepare_emoji
from dalle_mini_impl.data.emoji_styles import STYLES
from dalle_mini_impl.errors import UserError


def main() -> int:
    """Read the flags, write the data set, print its counts; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Write emoji pictures and captions as an image folder."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--size", type=int, default=64, help="side length in pixels (default: 64)")
    parser.add_argument(
        "--styles", default="twemoji", help=f"comma-separated, of {', '.join(STYLES)}"
    )
    parser.add_argument(
        "--npm-dir", type=Path, help="folder with unpacked npm packages (noto, fluent)"
    )
    arguments = parser.parse_args()
    styles = [style.strip() for style in arguments.styles.split(",")]
    try:
        report = prepare_emoji(
            arguments.out, size=arguments.size, styles=styles, npm_dir=arguments.npm_dir
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.out}: {report.pictures} pictures of {arguments.size} x {arguments.size}")
    for name, counts in (("split", report.splits), ("style", report.styles)):
        print(
            f"  per {name}: " + ", ".join(f"{key} {count}" for key, count in sorted(counts.items()))
        )
    print(
        f"  left out: {report.identical} identical, {report.unnamed} without a name; "
        f"moved to train: {report.moved_to_train} nearly identical, "
        f"of which left out: {report.inconsistent} (held out in another style)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
