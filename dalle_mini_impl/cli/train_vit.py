"""Train a Vision Transformer to classify images."""

from collections.abc import Sequence

from dalle_mini_impl.cli.train_command import train
from dalle_mini_impl.training.vit import ViTRunConfig, train_vit


def main(arguments: Sequence[str]) -> None:
    """Train from a preset and overrides."""
    train("train_vit", ViTRunConfig, train_vit, arguments)
