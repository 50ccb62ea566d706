"""Train an image tokenizer: python scripts/train_vqvae.py --config configs/demo/vqvae.yaml."""

import sys

from dalle_mini_impl.cli.main import run_command

if __name__ == "__main__":
    run_command("train_vqvae", sys.argv[1:])
