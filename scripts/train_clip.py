"""Train a ranker of images: python scripts/train_clip.py --config configs/clip/emoji.yaml."""

import sys

from dalle_mini_impl.cli.main import run_command

if __name__ == "__main__":
    run_command("train_clip", sys.argv[1:])
