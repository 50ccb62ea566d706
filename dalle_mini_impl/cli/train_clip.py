"""Train a CLIP, to rank generated images."""

from collections.abc import Sequence

from dalle_mini_impl.cli.train_command import train
from dalle_mini_impl.training.clip import ClipRunConfig, train_clip


def main(arguments: Sequence[str]) -> None:
    """Train from a preset and overrides."""
    train("train_clip", ClipRunConfig, train_clip, arguments)
