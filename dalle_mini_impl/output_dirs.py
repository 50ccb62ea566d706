"""Output folders: made, tested for writing and locked for one run, before any work is done."""

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
        field: The option that named it, for the message.

    Raises:
        UserError: If it is no folder or not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Permissions do not tell: the file system may be read-only, or full.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{field}: {folder}: {error.strerror}; expected a folder that can be written to"
        ) from None


@contextmanager
def locked_folder(folder: Path, *, field: str) -> Iterator[None]:
    """Keep other runs out of a folder.

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
    # The kernel releases the lock of a killed process, so no stale lock can stay behind.
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
    """Reserve a folder for the files of one program, so that it overwrites nobody else's.

    Args:
        folder: Made if missing, with its parents.
        field: The option that named it, for the message.
        writer: The program that fills it.

    Raises:
        UserError: If it holds files of another writer, or writing fails.
    """
    make_folder(folder, field=field)
    marker = folder / _MARKER
    try:
        # The marker comes first, so that an interrupted program may start over.
        if not marker.is_file() or marker.read_text(encoding="utf-8") != writer:
            # Hidden files, such as those of a file manager, are never overwritten.
            if any(not path.name.startswith(".") for path in folder.iterdir()):
                raise UserError(
                    f"{field}: {folder} holds files that {writer} did not write; expected a new or "
                    "empty folder"
                )
            marker.write_text(writer, encoding="utf-8")
        yield
    except OSError as error:
        raise UserError(f"{field}: writing {folder} failed: {error}") from None
