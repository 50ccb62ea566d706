"""Train a translator on pairs of texts."""

from collections.abc import Sequence

from dalle_mini_impl.cli.train_command import train
from dalle_mini_impl.training.translation import TranslationRunConfig, train_translation


def main(arguments: Sequence[str]) -> None:
    """Train from a preset and overrides."""
    train("train_translation", TranslationRunConfig, train_translation, arguments)
