"""Train a ranker of images: python scripts/train_clip.py --config configs/clip/emoji.yaml."""

import sys
from collections.abc import Sequence

from dalle_mini_impl.cli.main import run_script
from dalle_mini_impl.config import load_config
from dalle_mini_impl.training.clip import ClipRunConfig, train_clip


def main(arguments: Sequence[str]) -> None:
    """Read the config and train."""
    config, resume = load_config(
        ClipRunConfig, arguments, description="Train a CLIP on captioned images."
    )
    train_clip(config, resume=resume)


if __name__ == "__main__":
    run_script(main, sys.argv[1:], takes_resume=True)
