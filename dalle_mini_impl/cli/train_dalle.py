"""Train a decoder on captioned images."""

from collections.abc import Sequence

from dalle_mini_impl.cli.train_command import train
from dalle_mini_impl.training.dalle import DalleRunConfig, train_dalle


def main(arguments: Sequence[str]) -> None:
    """Train from a preset and overrides."""
    train("train_dalle", DalleRunConfig, train_dalle, arguments)
