"""Train an image tokenizer: python scripts/train_vqvae.py --config configs/demo/vqvae.yaml."""

import sys
from collections.abc import Sequence

from dalle_mini_impl.cli.main import run_script
from dalle_mini_impl.config import load_config
from dalle_mini_impl.training.vqvae import VQVAERunConfig, train_vqvae


def main(arguments: Sequence[str]) -> None:
    """Read the config and train."""
    config, resume = load_config(
        VQVAERunConfig, arguments, description="Train an image tokenizer (discrete VAE)."
    )
    train_vqvae(config, resume=resume)


if __name__ == "__main__":
    run_script(main, sys.argv[1:], takes_resume=True)
