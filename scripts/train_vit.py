"""Train a classifier of images: python scripts/train_vit.py --config configs/vit/digits.yaml."""

import sys
from collections.abc import Sequence

from dalle_mini_impl.cli.main import run_script
from dalle_mini_impl.config import load_config
from dalle_mini_impl.training.vit import ViTRunConfig, train_vit


def main(arguments: Sequence[str]) -> None:
    """Read the config and train."""
    config, resume = load_config(
        ViTRunConfig, arguments, description="Train a Vision Transformer to classify images."
    )
    train_vit(config, resume=resume)


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
