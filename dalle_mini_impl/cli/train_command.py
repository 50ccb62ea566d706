"""The part that all ``train_*`` commands have in common."""

from collections.abc import Callable, Sequence
from typing import Any

from dalle_mini_impl.cli.main import COMMANDS
from dalle_mini_impl.config import load_config


def train(
    command: str, config_class: type[Any], run: Callable[..., Any], arguments: Sequence[str]
) -> None:
    """Read a run's config from the command line and train."""
    config, resume = load_config(config_class, arguments, description=COMMANDS[command])
    run(config, resume=resume)
