"""Train an image tokenizer (discrete VAE)."""

from collections.abc import Sequence

from dalle_mini_impl.cli.train_command import train
from dalle_mini_impl.training.vqvae import VQVAERunConfig, train_vqvae


def main(arguments: Sequence[str]) -> None:
    """Train from a preset and overrides."""
    train("train_vqvae", VQVAERunConfig, train_vqvae, arguments)
