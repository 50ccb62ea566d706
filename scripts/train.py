"""Train a model on your own images: python scripts/train.py FOLDER --minutes 30."""

import sys

from dalle_mini_impl.cli.main import run_command

if __name__ == "__main__":
    run_command("train", sys.argv[1:])
