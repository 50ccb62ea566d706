"""The rules of captions that all readers share, and captions from the names of files."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from dalle_mini_impl.data.images import Fit
from dalle_mini_impl.data.readers.paths import is_unicode
from dalle_mini_impl.data.readers.records import MAX_TEXT_BYTES
from dalle_mini_impl.data.readers.split_names import split_in_name

CAPTION_COLUMNS = ("text", "text_ko", "caption", "texts", "texts_ko")  # main captions first
TEXT_PREFIX = "text:"
_EMPTY_WORDS = ("nan", "none", "null")  # what pandas, Python and SQL write for nothing
_COUNTER = re.compile(r"[\s_-]*(?:\(\d+\)|\d+)$")


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What a reader takes as image and as caption."""

    caption_columns: tuple[str, ...] = CAPTION_COLUMNS
    """Fields, columns or JSON members with captions, in their order."""
    image_column: str | None = None
    """Field or column of the image; None: the usual names."""
    captions_from: str | None = None
    """None: the source's own captions; ``file_name``, ``folder_name``, or ``text:`` and a text."""
    needs_captions: bool = True
    """Whether images without caption are left out."""
    fit: Fit = "crop"
    """How an image gets its size, as in ``images.resize_to_fit``."""


DEFAULT_OPTIONS = ReadOptions()


def is_captions_from(value: str | None) -> bool:
    """Tell whether a value of ``ReadOptions.captions_from`` is a valid one."""
    if value is None or value in ("file_name", "folder_name"):
        return True
    return value.startswith(TEXT_PREFIX) and bool(clean(value.removeprefix(TEXT_PREFIX)))


def clean(text: str) -> str:
    """Turn white space into single spaces; nothing is left of "nan", "None" and "null"."""
    text = " ".join(text.split())
    return "" if text.lower() in _EMPTY_WORDS else text


def collect_captions(fields: Mapping[str, Any], caption_columns: Sequence[str]) -> tuple[str, ...]:
    """Gather the captions of a record from its caption columns, in their order, without repeats.

    A caption column holds a string or a list of strings; empty, null and non-text entries are
    dropped.
    """
    # A dict as an ordered set.
    found: dict[str, None] = {}
    for column in caption_columns:
        value = fields.get(column)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and len(text) <= MAX_TEXT_BYTES and is_unicode(text):
                found[clean(text)] = None
    # Captions of white space alone collapse to nothing.
    found.pop("", None)
    return tuple(found)


def no_caption_reason(fields: Mapping[str, Any], caption_columns: Sequence[str]) -> str:
    """Say why ``collect_captions`` found nothing."""
    present = [column for column in caption_columns if column in fields]
    for column in present:
        if isinstance(fields[column], str) and fields[column].strip().lower() in _EMPTY_WORDS:
            return f"no caption: {column} is {fields[column].strip()!r}"
    if present:
        return f"no caption: {', '.join(present)} is empty, null, too long or not text"
    names = ", ".join(list(fields)[:20])
    return (
        f"no caption: it has none of the fields {', '.join(caption_columns)} (it has {names}); "
        "data.caption_columns names others"
    )


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
    lines = [clean(line) for line in text.split("\n")]
    return tuple(dict.fromkeys(line for line in lines if line))


def caption_of_path(path: str, captions_from: str) -> str:
    """Make the caption of an image from its key, as ``ReadOptions.captions_from`` says.

    "red_cup-03.jpg" becomes "red cup", and so does "red cup/001.jpg" by its folder; empty where the
    name holds no words.
    """
    if captions_from.startswith(TEXT_PREFIX):
        return clean(captions_from.removeprefix(TEXT_PREFIX))
    # "x.tar!red cup/001.jpg": a tar is no folder.
    key = PurePosixPath(path.rpartition("!")[2])
    if captions_from == "file_name":
        return _words_of(key.stem)
    if split_in_name(key.parent.name, whole=True):
        return ""  # "train/001.jpg" is no train
    # "10_red cup": the number of repeats, as sd-scripts has it.
    return _words_of(re.sub(r"^\d+_", "", key.parent.name))


def _words_of(name: str) -> str:
    # "red cup 03", "red_cup_(2)": which image of its kind it is.
    while (shorter := _COUNTER.sub("", name)) != name:
        name = shorter
    name = name.replace("_", " ")
    # "red-cup" has no other sign between its words, "blue t-shirt" does.
    return clean(name if " " in name.strip() else name.replace("-", " "))
