"""Train a decoder: python scripts/train_dalle.py --config configs/demo/dalle.yaml."""

import sys
from collections.abc import Sequence

from dalle_mini_impl.cli.main import run_script
from dalle_mini_impl.config import load_config
from dalle_mini_impl.training.dalle import DalleRunConfig, train_dalle


def main(arguments: Sequence[str]) -> None:
    """Read the config and train."""
    config, resume = load_config(
        DalleRunConfig, arguments, description="Train a decoder on captioned images."
    )
    train_dalle(config, resume=resume)


if __name__ == "__main__":
    run_script(main, sys.argv[1:], takes_resume=True)
