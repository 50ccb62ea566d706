"""Output folders: made, proved writable and kept for one run, before work is done for them."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dalle_mini_impl.errors import UserError

LOCK_NAME = ".run.lock"
_MARKER = ".written_by"


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
            f"{field}: {folder}: {error.strerror}; expected a folder that can be written to"
        ) from None


@contextmanager
def locked_folder(folder: Path, *, field: str) -> Iterator[None]:
    """Keep every other run out of a folder; the system forgets the lock of a killed process.

    Args:
        folder: Can be written to.
        field: Name of the option that gave it, for the message.

    Raises:
        UserError: If another run holds it.
    """
    if sys.platform == "win32":  # has no flock
        yield
        return
    import fcntl

    try:
        file = (folder / LOCK_NAME).open("w")
    except OSError as error:
        raise UserError(f"{field}: cannot write {folder / LOCK_NAME}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{field}: {folder} is in use by another run; wait for its end, or take another "
                f"{field}"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


@contextmanager
def data_set_folder(folder: Path, *, field: str, writer: str) -> Iterator[None]:
    """Keep a folder for the files of one program, so that nobody else's are overwritten.

    A hidden file names the program, from the start on: an interrupted one may begin anew.

    Args:
        folder: Made if missing, with its parents.
        field: Name of the option that gave it, for the message.
        writer: Name of the program that fills it.

    Yields:
        Once, to the code that writes; its input and output errors become one line.

    Raises:
        UserError: If it holds files that `writer` did not write, or cannot be written to.
    """
    make_folder(folder, field=field)
    marker = folder / _MARKER
    try:
        if not marker.is_file() or marker.read_text(encoding="utf-8") != writer:
            # Hidden files are left alone anyway, such as those of a file manager.
            if any(not path.name.startswith(".") for path in folder.iterdir()):
                raise UserError(
                    f"{field}: {folder} holds files that {writer} did not write; expected a new or "
                    "empty folder"
                )
            marker.write_text(writer, encoding="utf-8")
        yield
    except OSError as error:
        raise UserError(f"{field}: writing {folder} failed: {error}") from None
