"""What all readers of captioned pictures share: their records, captions and path rules.

The readers (`folder_reader`, `tar_reader`, `table_reader`) return a `Listing`: where each picture's
bytes lie, and its captions. No picture is opened at that point.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
OTHER_PICTURE_SUFFIXES = (".gif", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jfif", ".svg")
MAX_PICTURE_BYTES = 256 * 2**20
MAX_TEXT_BYTES = 2**20
WHOLE_FILE = -1


@dataclass(frozen=True)
class SkippedRecord:
    """One record that was left out."""

    path: str
    """File path, tar!member, or row, as in `Pair.path`."""
    reason: str
    """Why, in a few words."""


@dataclass(frozen=True)
class RawPair:
    """A captioned picture, and where its bytes lie."""

    path: str
    """Key shown in messages, unique within the source."""
    captions: tuple[str, ...]
    """At least one caption, none empty."""
    attributes: dict[str, Any]
    """Whatever else the source says about the picture."""
    split: str | None
    """Name of the split the source puts it in, if it does."""
    file: str = ""
    """File that holds the bytes; empty if they lie in row `offset` of `Listing.pictures`."""
    offset: int = 0
    """First byte in the file, or row number."""
    size: int = WHOLE_FILE
    """Number of bytes, or `WHOLE_FILE`."""


@dataclass
class Listing:
    """Everything a reader found in a source."""

    pairs: list[RawPair] = field(default_factory=list)
    skipped: list[SkippedRecord] = field(default_factory=list)
    pictures: "Dataset | None" = None

    def skip(self, path: str, reason: str) -> None:
        """Notes a record that is left out.

        Args:
            path: Its path or key.
            reason: Why.
        """
        self.skipped.append(SkippedRecord(printable(path), printable(reason)))


def collect_captions(fields: Mapping[str, Any], text_columns: Sequence[str]) -> tuple[str, ...]:
    """Gathers the captions of a record from its text columns, in their order, without repeats.

    Args:
        fields: The record; a text column holds a string or a list of strings.
        text_columns: Columns to look at.

    Returns:
        Captions with single spaces; empty, null and non-text entries are dropped.
    """
    found: dict[str, None] = {}
    for column in text_columns:
        value = fields.get(column)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and is_unicode(text) and text.strip():
                found[collapse(text)] = None
    return tuple(found)


def no_caption_reason(fields: Mapping[str, Any], text_columns: Sequence[str]) -> str:
    """Says why `collect_captions` found nothing.

    Args:
        fields: The record.
        text_columns: Columns that were looked at.

    Returns:
        The reason, naming the columns.
    """
    present = [column for column in text_columns if column in fields]
    if present:
        return f"no caption: {', '.join(present)} is empty, null or not text"
    names = ", ".join(list(fields)[:20])
    return f"no caption: it has none of the fields {', '.join(text_columns)} (it has {names})"


def lines_of_captions(data: bytes) -> tuple[str, ...]:
    """Reads a caption file: UTF-8, one caption per line.

    Args:
        data: The file's bytes.

    Returns:
        Captions with single spaces, no empty ones.

    Raises:
        ValueError: Not UTF-8.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"its caption is not UTF-8 text (byte {error.start})") from error
    lines = [collapse(line) for line in text.split("\n")]
    return tuple(dict.fromkeys(line for line in lines if line))


def other_format_reason(name: str) -> str:
    """Says why a picture file of another format is left out.

    Args:
        name: Its name.

    Returns:
        The reason, naming the formats that are read.
    """
    return f"{name} is there, but its format is not one of {', '.join(PICTURE_SUFFIXES)}"


def collapse(text: str) -> str:
    """Turns every run of white space into one space and cuts both ends.

    Args:
        text: Any text.

    Returns:
        One line.
    """
    return " ".join(text.split())


def is_unicode(text: str) -> bool:
    """Tells whether a string can be written as UTF-8 (half surrogate pairs cannot).

    Args:
        text: Any string.

    Returns:
        True if it can.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    """Escapes what would break a one-line message (line ends, control codes, bad Unicode).

    Args:
        text: A path or a reason.

    Returns:
        The text in printable characters.
    """
    escape = "unicode_escape"
    return "".join(c if c.isprintable() else c.encode(escape).decode("ascii") for c in text)


def encoding_remedy() -> str:
    """Tells what to change where the system's encoding cannot hold every file name.

    Returns:
        The end of a reason; empty where the encoding is UTF-8.
    """
    encoding = sys.getfilesystemencoding()
    if encoding.lower() == "utf-8":
        return ""
    return f" in this system's encoding, {encoding}; set PYTHONUTF8=1"


def leads_outside(name: str) -> bool:
    """Tells whether a relative file name, as written, could leave its folder.

    Args:
        name: File name from a metadata file or an archive, with / or backslashes.

    Returns:
        True for absolute names (Windows drives too) and for any `..` part.
    """
    windows = PureWindowsPath(name)
    absolute = PurePosixPath(name).is_absolute() or bool(windows.drive or windows.root)
    return absolute or ".." in windows.parts


def is_inside(path: Path, folder: Path) -> bool:
    """Tells whether a path lies in a folder once symbolic links are followed.

    Args:
        path: Path to judge.
        folder: The folder, itself already resolved.

    Returns:
        True if it does.
    """
    try:
        return Path(os.path.realpath(path)).is_relative_to(folder)
    except (OSError, ValueError):  # a link loop; a NUL in the name
        return False
