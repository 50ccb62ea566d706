"""Train: python scripts/train_translation.py --config configs/translation/base.yaml."""

import sys

from dalle_mini_impl.cli.main import run_command

if __name__ == "__main__":
    run_command("train_translation", sys.argv[1:])
