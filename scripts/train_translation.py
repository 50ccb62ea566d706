"""Train: python scripts/train_translation.py --config configs/translation/base.yaml."""

import sys
from collections.abc import Sequence

from dalle_mini_impl.cli.main import run_script
from dalle_mini_impl.config import load_config
from dalle_mini_impl.training.translation import TranslationRunConfig, train_translation


def main(arguments: Sequence[str]) -> None:
    """Read the config and train."""
    config, resume = load_config(
        TranslationRunConfig, arguments, description="Train a translator on pairs of texts."
    )
    train_translation(config, resume=resume)


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
