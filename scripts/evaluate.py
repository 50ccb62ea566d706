"""Measure a model on held-out images: python scripts/evaluate.py --model out/demo/dalle/model."""

import sys

from dalle_mini_impl.cli.main import run_command

if __name__ == "__main__":
    run_command("evaluate", sys.argv[1:])
