"""Write a set of scenes: python scripts/prepare_scenes.py --out out/scenes/data."""

import sys

from dalle_mini_impl.cli.main import run_command

if __name__ == "__main__":
    run_command("prepare_scenes", sys.argv[1:])
