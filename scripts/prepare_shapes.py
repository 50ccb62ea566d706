"""Write a set of the shapes world: python scripts/prepare_shapes.py --out out/shapes/data."""

import sys

from dalle_mini_impl.cli.main import run_command

if __name__ == "__main__":
    run_command("prepare_shapes", sys.argv[1:])
