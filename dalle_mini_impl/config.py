"""One way to a run's config: a YAML preset, then dotted overrides, checked field by field."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentError, ArgumentParser

from dalle_mini_impl.errors import UserError

Config = TypeVar("Config")


def load_config(
    config_class: type[Config], arguments: Sequence[str], *, description: str
) -> tuple[Config, str | None]:
    """Read ``--config FILE``, then ``--section.field VALUE`` overrides.

    Args:
        config_class: A run's dataclass.
        arguments: The command line without the program.
        description: First line of ``--help``.

    Returns:
        The config, and the value of ``--resume``.

    Raises:
        UserError: If a key is unknown, a required field is missing, or a value does not fit.
    """
    parser = ArgumentParser(description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML preset; see configs/*/*.yaml")
    parser.add_argument(
        "--resume", type=str | None, default=None, help="latest, or a checkpoint folder"
    )
    parser.add_class_arguments(config_class, as_positional=False)
    try:
        parsed = parser.instantiate(parser.parse_args(list(arguments)))
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"config: {_one_line(error)}; wanted a YAML file in UTF-8") from None
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(f"{_one_line(error)}; --help lists all options") from None
    values: dict[str, Any] = vars(parsed)
    resume = values.pop("resume")
    values.pop("config", None)
    try:
        return config_class(**values), resume
    except ValueError as error:
        raise UserError(_one_line(error)) from None


def read_config(config_class: type[Config], path: str | Path) -> Config:
    """Read a preset without overrides.

    Args:
        config_class: A run's dataclass.
        path: YAML file.

    Returns:
        The config.

    Raises:
        UserError: As ``load_config``.
    """
    return load_config(config_class, ["--config", str(path)], description="")[0]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
