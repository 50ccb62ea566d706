"""What all readers of captioned images share: their records, captions and path rules.

The readers (`folder_reader`, `tar_reader`, `table_reader`) return a `Listing`: where each image's
bytes lie, and its captions. No image is opened at that point.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
OTHER_IMAGE_SUFFIXES = (".gif", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jfif", ".svg")
MAX_IMAGE_BYTES = 256 * 2**20
MAX_TEXT_BYTES = 2**20
MAX_NESTING = 64
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
    """A captioned image, and where its bytes lie."""

    path: str
    """Key shown in messages, unique within the source."""
    captions: tuple[str, ...]
    """At least one caption, none empty."""
    attributes: dict[str, Any]
    """Whatever else the source says about the image."""
    split: str | None
    """Name of the split the source puts it in, if it does."""
    file: str = ""
    """File that holds the bytes; empty if they lie in row `offset` of `Listing.images`."""
    offset: int = 0
    """First byte in the file, or row number."""
    size: int = WHOLE_FILE
    """Number of bytes, or `WHOLE_FILE`."""


@dataclass
class Listing:
    """Everything a reader found in a source."""

    pairs: list[RawPair] = field(default_factory=list)
    skipped: list[SkippedRecord] = field(default_factory=list)
    images: "Dataset | None" = None

    def skip(self, path: str, reason: str) -> None:
        """Notes a record that is left out.

        Args:
            path: Its path or key.
            reason: Why.
        """
        self.skipped.append(SkippedRecord(printable(path), printable(reason)))


def parse_object(data: bytes) -> dict[str, Any]:
    """Reads one JSON object: UTF-8, of limited length and nesting.

    Args:
        data: The bytes, a byte order mark allowed.

    Returns:
        The object's fields.

    Raises:
        ValueError: What is wrong with it.
    """
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(f"longer than {MAX_TEXT_BYTES} bytes")
    try:
        fields = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"a JSON {type(fields).__name__}, expected an object {{...}}")
    if _nesting(fields) > MAX_NESTING:
        raise ValueError(f"nested deeper than {MAX_NESTING}")
    return fields


def _nesting(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        below = (item.values() if isinstance(item, dict) else item for item in level)
        level = [item for items in below for item in items if isinstance(item, dict | list)]
    return depth


def files_below(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Walks a folder, folders before their sub-folders; links to folders are not followed.

    Unlike `os.walk` and `Path.rglob` it does not recurse, so no depth of folders stops it.

    Args:
        folder: Where to begin.

    Yields:
        A folder and the sorted names of the regular files in it (or links to such). Hidden files
        and folders (names with a leading dot) are passed over; so are folders that cannot be read.
    """
    waiting = [folder]
    while waiting:
        parent = waiting.pop()
        try:
            with os.scandir(parent) as entries:
                visible = sorted(
                    (entry for entry in entries if not entry.name.startswith(".")),
                    key=lambda entry: entry.name,
                )
                folders = [entry.name for entry in visible if entry.is_dir(follow_symlinks=False)]
        except OSError:
            continue
        names = [entry.name for entry in visible if entry.name not in set(folders)]
        waiting += [parent / name for name in reversed(folders)]
        yield parent, names


def are_too_many(num_bad: int, num_records: int, max_bad_fraction: float) -> bool:
    """Say whether a set has more bad records than it may; one is always allowed.

    Args:
        num_bad: Records that cannot be used.
        num_records: Of the whole set, these among them.
        max_bad_fraction: Largest share taken, in [0, 1].

    Returns:
        True if so.
    """
    return num_bad > max(1, max_bad_fraction * num_records)


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
            if isinstance(text, str) and len(text) <= MAX_TEXT_BYTES and is_unicode(text):
                found[collapse(text)] = None
    found.pop("", None)
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
        return f"no caption: {', '.join(present)} is empty, null, too long or not text"
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
    """Says why an image file of another format is left out.

    Args:
        name: Its name.

    Returns:
        The reason, naming the formats that are read.
    """
    return f"{name} is there, but its format is not one of {', '.join(IMAGE_SUFFIXES)}"


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
