"""Write a set of the shapes world: python scripts/prepare_shapes.py --out out/shapes/data."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dalle_mini_impl.cli.main import OneLineParser, run_script


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    from dalle_mini_impl.builtin_datasets.shapes.scene import KINDS

    parser = OneLineParser(description="Write images of shapes with captions and facts.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--size", type=int, default=32, help="side in pixels (default: 32)")
    parser.add_argument("--train", type=int, default=20_000, help="images (default: 20000)")
    parser.add_argument("--test", type=int, default=1_000, help="images (default: 1000)")
    parser.add_argument("--test-compose", type=int, default=1_000, help="images (default: 1000)")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=KINDS, help="of scene (default: all)"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Write the data set and print its counts."""
    options = parse(arguments)
    from dalle_mini_impl.builtin_datasets.shapes.captions import prepare_shapes

    counts = {
        "train": options.train,
        "test": options.test,
        "test_compose": options.test_compose,
    }
    total = prepare_shapes(options.out, counts=counts, image_size=options.size, kinds=options.kinds)
    print(f"{options.out}: {total} images of {options.size} x {options.size}")
    print("  per split: " + ", ".join(f"{split} {count}" for split, count in counts.items()))


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
