"""The record of one captioned image, and the list of them that every reader returns.

A reader lists a source as ``Pairs``: where the bytes of each image lie, and its captions. It opens
no image. For sets that do not fit in memory, a store on disk can take the place of the list.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dalle_mini_impl.data.images import BadImageError, Fit

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
    """All paraphrases and languages, none empty. None at all only where no captions are needed."""
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
    notes: list[SkippedRecord] = field(default_factory=list)
    """What is no record, and left out without harm."""
    no_caption_reasons: dict[str, str] = field(default_factory=dict)
    """Why an image has no caption, by its path, as long as ``require_captions`` was not called."""
    fit: Fit = "crop"
    """How an image gets its size, as in ``images.resize_to_fit``."""

    def __len__(self) -> int:
        return len(self.listed)

    def __getitem__(self, index: int) -> Pair:
        return self.listed[index]

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.listed)

    def skip(self, path: str, reason: str) -> None:
        """Note a record that is left out."""
        self.skipped.append(SkippedRecord(printable(path), printable(reason)))

    def note(self, path: str, reason: str) -> None:
        """Note what is no image and no caption; records with the same reason are shown together."""
        self.notes.append(SkippedRecord(printable(path), printable(reason)))

    def add(self, pair: Pair, no_caption_reason: str = "") -> None:
        """List an image; one without caption with the reason."""
        self.listed.append(pair)
        if not pair.captions:
            self.no_caption_reasons[pair.path] = no_caption_reason

    def extend(self, others: "Pairs") -> None:
        """Add what another reader has listed; tables excepted."""
        self.listed += others.listed
        self.skipped += others.skipped
        self.notes += others.notes
        self.no_caption_reasons |= others.no_caption_reasons

    def require_captions(self) -> "Pairs":
        """Leave out the images without caption."""
        for pair in self.listed:
            if not pair.captions:
                self.skip(pair.path, self.no_caption_reasons[pair.path])
        self.listed = [pair for pair in self.listed if pair.captions]
        return self

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


def are_too_many(num_bad: int, num_records: int, max_bad_fraction: float) -> bool:
    """Tell whether a set has more bad records than it may; one is always allowed."""
    return num_bad > max(1, max_bad_fraction * num_records)


def notes_by_reason(notes: Sequence[SkippedRecord]) -> dict[str, list[str]]:
    """Group the paths of notes that say the same."""
    groups: dict[str, list[str]] = {}
    for note in notes:
        groups.setdefault(note.reason, []).append(note.path)
    return groups


def split_field(fields: Mapping[str, Any]) -> str | None:
    """Return the split that a record names, if it names one."""
    split = fields.get("split")
    return split if isinstance(split, str) else None


def other_fields(fields: Mapping[str, Any], used: Sequence[str]) -> dict[str, Any]:
    """Return the attributes of a record: what is in none of the columns that are used."""
    return {key: value for key, value in fields.items() if key not in used}


def other_format_reason(name: str) -> str:
    """Say why an image file of another format is left out."""
    return f"{name} is there, but its format is not one of {', '.join(IMAGE_SUFFIXES)}"


def printable(text: str) -> str:
    """Escape what would break a one-line message (line ends, control codes, bad Unicode)."""
    escape = "unicode_escape"
    return "".join(c if c.isprintable() else c.encode(escape).decode("ascii") for c in text)
