"""Train a decoder: python scripts/train_dalle.py --config configs/demo/dalle.yaml."""

import sys

from dalle_mini_impl.cli.main import run_command

if __name__ == "__main__":
    run_command("train_dalle", sys.argv[1:])
