"""The record of one captioned image, and the rules of captions and paths that all readers share.

A reader lists a source as ``Pairs``: where the bytes of each image lie, and its captions. It opens
no image. For sets that do not fit in memory, a store on disk can take the place of the list.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from dalle_mini_impl.data.images import BadImageError

if TYPE_CHECKING:
    from datasets import Dataset

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
OTHER_IMAGE_SUFFIXES = (".gif", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jfif", ".svg")
MAX_IMAGE_BYTES = 256 * 2**20
MAX_TEXT_BYTES = 2**20
MAX_NESTING = 64
WHOLE_FILE = -1


@dataclass(frozen=True)
class Pair:
    """A captioned image, and where its bytes lie."""

    path: str
    """Key shown in messages, unique within the source: path in the folder, tar!member, or row."""
    captions: tuple[str, ...]
    """At least one caption, none empty: all paraphrases and languages."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """Whatever else the source says about the image, in types of JSON."""
    split: str | None = None
    """Name of the split the source puts it in, if it does."""
    file: str = ""
    """File that holds the bytes; empty if they lie in row ``offset`` of ``Pairs.table``."""
    offset: int = 0
    """First byte in the file, or row number."""
    size: int = WHOLE_FILE
    """Number of bytes, or ``WHOLE_FILE``."""


@dataclass(frozen=True)
class SkippedRecord:
    """One record that was left out."""

    path: str
    """As ``Pair.path``."""
    reason: str
    """Why, in a few words."""


@dataclass
class Pairs:
    """The captioned images of a source or of one of its splits, and what was left out.

    Images stay where they are: ``read_image`` reads the bytes of one, ``images.decode_image``
    decodes them.
    """

    listed: list[Pair] = field(default_factory=list)
    skipped: list[SkippedRecord] = field(default_factory=list)
    """Records of the whole source that were left out."""
    table: "Dataset | None" = None
    """Rows of one column with encoded images, for sources that are tables."""
    num_records: int = 0
    """Records of the whole source, those left out included."""

    def __len__(self) -> int:
        return len(self.listed)

    def __getitem__(self, index: int) -> Pair:
        return self.listed[index]

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.listed)

    def skip(self, path: str, reason: str) -> None:
        """Note a record that is left out."""
        self.skipped.append(SkippedRecord(printable(path), printable(reason)))

    def read_image(self, index: int) -> bytes:
        """Read the encoded bytes of one image.

        Raises:
            BadImageError: The file is gone, unreadable or larger than 256 MiB.
        """
        pair = self.listed[index]
        if not pair.file:
            assert self.table is not None
            [value] = self.table[pair.offset].values()
            return bytes(value["bytes"])
        is_whole = pair.size == WHOLE_FILE
        try:
            with open(pair.file, "rb") as file:
                # The size now: the file may have grown since it was listed.
                if is_whole and os.fstat(file.fileno()).st_size > MAX_IMAGE_BYTES:
                    raise BadImageError(pair.path, f"larger than {MAX_IMAGE_BYTES} bytes")
                file.seek(pair.offset)
                data = file.read(MAX_IMAGE_BYTES if is_whole else pair.size)
        except OSError as error:
            raise BadImageError(pair.path, f"cannot be read ({error.strerror})") from error
        # The tar has been cut since it was listed.
        if not is_whole and len(data) != pair.size:
            raise BadImageError(pair.path, f"{len(data)} bytes left, expected {pair.size}")
        return data


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse one JSON object: UTF-8 (a byte order mark allowed), of limited length and nesting.

    Raises:
        ValueError: What is wrong with it.
    """
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(f"longer than {MAX_TEXT_BYTES} bytes")
    try:
        fields = json.loads(data.decode("utf-8-sig"))
    # json recurses for every nested list: a line of brackets exhausts the stack.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"a JSON {type(fields).__name__}, expected an object {{...}}")
    if _nesting(fields) > MAX_NESTING:
        raise ValueError(f"nested deeper than {MAX_NESTING}")
    return fields


def _nesting(value: Any) -> int:
    # Level by level, since a hostile value would exhaust the stack of a recursion.
    depth, level = 0, [value]
    while level:
        depth += 1
        below = (item.values() if isinstance(item, dict) else item for item in level)
        level = [item for items in below for item in items if isinstance(item, dict | list)]
    return depth


def files_below(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Walk a folder, each before its sub-folders, and yield it with the sorted names of its files.

    Hidden files and folders (names with a leading dot), linked folders and folders that cannot be
    read are passed over.
    """
    # Unlike ``os.walk`` and ``Path.rglob`` no recursion, so that no depth of folders stops it.
    remaining = [folder]
    while remaining:
        parent = remaining.pop()
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
        # Reversed, since the last one is taken next: folders come in sorted order.
        remaining += [parent / name for name in reversed(folders)]
        yield parent, names


def are_too_many(num_bad: int, num_records: int, max_bad_fraction: float) -> bool:
    """Tell whether a set has more bad records than it may; one is always allowed."""
    return num_bad > max(1, max_bad_fraction * num_records)


def collect_captions(fields: Mapping[str, Any], text_columns: Sequence[str]) -> tuple[str, ...]:
    """Gather the captions of a record from its text columns, in their order, without repeats.

    A text column holds a string or a list of strings; empty, null and non-text entries are dropped.
    """
    # A dict as an ordered set.
    found: dict[str, None] = {}
    for column in text_columns:
        value = fields.get(column)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and len(text) <= MAX_TEXT_BYTES and is_unicode(text):
                found[collapse(text)] = None
    # Captions of white space alone collapse to nothing.
    found.pop("", None)
    return tuple(found)


def no_caption_reason(fields: Mapping[str, Any], text_columns: Sequence[str]) -> str:
    """Say why ``collect_captions`` found nothing."""
    present = [column for column in text_columns if column in fields]
    if present:
        return f"no caption: {', '.join(present)} is empty, null, too long or not text"
    names = ", ".join(list(fields)[:20])
    return f"no caption: it has none of the fields {', '.join(text_columns)} (it has {names})"


def split_field(fields: Mapping[str, Any]) -> str | None:
    """Return the split that a record names, if it names one."""
    split = fields.get("split")
    return split if isinstance(split, str) else None


def other_fields(fields: Mapping[str, Any], used: Sequence[str]) -> dict[str, Any]:
    """Return the attributes of a record: what is in none of the columns that are used."""
    return {key: value for key, value in fields.items() if key not in used}


def lines_of_captions(data: bytes) -> tuple[str, ...]:
    """Read a caption file: UTF-8, one caption per line, single spaces, no empty ones.

    Raises:
        ValueError: Not UTF-8.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"its caption is not UTF-8 text (byte {error.start})") from error
    # Not splitlines, which also splits at form feeds and other signs within a caption.
    lines = [collapse(line) for line in text.split("\n")]
    return tuple(dict.fromkeys(line for line in lines if line))


def other_format_reason(name: str) -> str:
    """Say why an image file of another format is left out."""
    return f"{name} is there, but its format is not one of {', '.join(IMAGE_SUFFIXES)}"


def collapse(text: str) -> str:
    """Turn every run of white space into one space and cut both ends."""
    return " ".join(text.split())


def is_unicode(text: str) -> bool:
    """Tell whether a string can be written as UTF-8 (half surrogate pairs cannot)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    """Escape what would break a one-line message (line ends, control codes, bad Unicode)."""
    escape = "unicode_escape"
    return "".join(c if c.isprintable() else c.encode(escape).decode("ascii") for c in text)


def encoding_remedy() -> str:
    """Say what to change where the system's encoding cannot hold every file name."""
    encoding = sys.getfilesystemencoding()
    if encoding.lower() == "utf-8":
        return ""
    return f" in this system's encoding, {encoding}; set PYTHONUTF8=1"


def leads_outside(name: str) -> bool:
    """Tell whether a relative file name, as written, could leave its folder.

    True for absolute names (Windows drives too) and for any ``..`` part, with / or backslashes.
    """
    # Windows rules on every system: the data set may travel.
    windows = PureWindowsPath(name)
    absolute = PurePosixPath(name).is_absolute() or bool(windows.drive or windows.root)
    return absolute or ".." in windows.parts


def is_inside(path: Path, folder: Path) -> bool:
    """Tell whether a path lies in a folder, itself resolved, once symbolic links are followed."""
    try:
        return Path(os.path.realpath(path)).is_relative_to(folder)
    except (OSError, ValueError):  # a link loop; a NUL in the name
        return False
