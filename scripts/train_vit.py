"""Train a classifier of images: python scripts/train_vit.py --config configs/vit/digits.yaml."""

import sys

from dalle_mini_impl.cli.main import run_command

if __name__ == "__main__":
    run_command("train_vit", sys.argv[1:])
