"""Write a set of the shapes world: python scripts/prepare_shapes.py --out data/shapes32."""

import argparse
import sys
from pathlib import Path

from dalle_mini_impl.data.shapes import KINDS
from dalle_mini_impl.data.shapes_captions import prepare_shapes
from dalle_mini_impl.errors import UserError


def main() -> int:
    """Read the flags, write the data set, print its counts; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Write pictures of shapes with captions and facts."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--size", type=int, default=32, help="side in pixels (default: 32)")
    parser.add_argument("--train", type=int, default=20_000, help="pictures (default: 20000)")
    parser.add_argument("--test", type=int, default=1_000, help="pictures (default: 1000)")
    parser.add_argument("--test-compose", type=int, default=1_000, help="pictures (default: 1000)")
    parser.add_argument(
        "--kinds", default=",".join(KINDS), help=f"comma-separated, of {', '.join(KINDS)}"
    )
    arguments = parser.parse_args()
    counts = {
        "train": arguments.train,
        "test": arguments.test,
        "test_compose": arguments.test_compose,
    }
    kinds = [kind.strip() for kind in arguments.kinds.split(",")]
    try:
        total = prepare_shapes(arguments.out, counts=counts, image_size=arguments.size, kinds=kinds)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.out}: {total} pictures of {arguments.size} x {arguments.size}")
    print("  per split: " + ", ".join(f"{split} {count}" for split, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
