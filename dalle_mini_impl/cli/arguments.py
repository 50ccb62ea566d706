"""Parts of the commands' parsers: one-line errors, paths with ``~``, lists of prompts."""

import argparse
import os
from pathlib import Path
from typing import NoReturn

from dalle_mini_impl.errors import UserError


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise UserError(f"{message}; {self.prog} --help lists all options")


def user_path(text: str) -> Path:
    """Read a path; the shell leaves the ``~`` of ``--out=~/images`` to us."""
    return Path(user_text(text))


def user_text(text: str) -> str:
    """Read what may also be a name on the Hub, or is shown as it was given."""
    if not text.strip():  # else read as the working folder
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a name")
    return os.path.expanduser(text)


def add_native(parser: argparse.ArgumentParser) -> None:
    """Add ``--native``, the compiled forward pass."""
    parser.add_argument(
        "--native",
        choices=("float32", "int8"),
        help="run the decoder in C++ compiled on this machine; see docs/sampling.md",
    )


def require_at_least(least: int, **values: int | None) -> None:
    """Refuse numbers below ``least`` by their names; None stands for a default."""
    for name, value in values.items():
        if value is not None and value < least:
            raise UserError(f"{name}: got {value}, expected at least {least}")


def read_lines(path: Path, *, field: str) -> list[str]:
    """Read the lines of a UTF-8 text file that are not empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors of Windows write a mark
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"{field}: {path}: {reason}; expected a UTF-8 text file") from None
    return [line.strip() for line in text.splitlines() if line.strip()]
