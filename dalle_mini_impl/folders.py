"""Output folders: made, and proved writable, before any work is done for them."""

import tempfile
from pathlib import Path

from dalle_mini_impl.errors import UserError


def make_folder(folder: Path, *, field: str) -> None:
    """Make a folder and write into it once.

    Args:
        folder: Made if missing, with its parents.
        field: Name of the option that gave it, for the message.

    Raises:
        UserError: If it is no folder or cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{field}: {folder}: {error.strerror}; wanted a folder that can be written to"
        ) from None
