"""WebDataset tars as img2dataset writes them: `key.jpg`, `key.txt` and `key.json` side by side.

Nothing is ever unpacked or unpickled. Only the member table is read; regular members with one of
seven extensions count, everything else is passed over, and images are later read in place.
"""

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from dalle_mini_impl.data.readers.records import (
    IMAGE_SUFFIXES,
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    OTHER_IMAGE_SUFFIXES,
    Listing,
    RawPair,
    collapse,
    collect_captions,
    is_unicode,
    leads_outside,
    lines_of_captions,
    no_caption_reason,
    other_format_reason,
    parse_object,
)

_TEXT_SUFFIXES = (".txt", ".json")
_BLOCK = 512  # bytes, the unit of tar files
_MAX_HEADER_BYTES = 2**14  # of long names and pax headers; Python 3.11.7 takes 0.5 s for so many


@dataclass(frozen=True)
class _Span:
    name: str
    offset: int
    size: int


class _HeaderReader:
    """A tar file for `tarfile`, which would read a long name or a pax header of any size."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise ValueError(f"a header of {size} bytes, expected at most {_MAX_HEADER_BYTES}")
        return self._file.read(size)


@dataclass
class _Sample:
    image: _Span | None = None
    other_image: str | None = None
    texts: dict[str, _Span] = field(default_factory=dict)


def read_tar(tar_path: Path, *, shown_name: str, text_columns: Sequence[str]) -> Listing:
    """Lists the captioned images of one uncompressed tar.

    Captions come from the text columns of `key.json` and the lines of `key.txt`. The key is the
    member's path without its last extension.

    Args:
        tar_path: The tar file.
        shown_name: Its name in keys and messages.
        text_columns: Fields of the JSON members that hold captions.

    Returns:
        Images in the order of the tar. Links, devices, sparse or oversized members, names that
        lead outside and incomplete samples are skipped; so is what lies behind a damaged header.
    """
    listing = Listing()
    samples: dict[str, _Sample] = {}
    try:
        with tar_path.open("rb") as file:
            try:
                _read_members(file, tar_path.stat().st_size, shown_name, samples, listing)
            finally:
                for key, sample in samples.items():
                    _add_sample(key, sample, file, tar_path, shown_name, text_columns, listing)
    except Exception as error:  # tarfile raises nearly anything when a header is damaged
        listing.skip(shown_name, f"not a tar file, or damaged ({type(error).__name__}: {error})")
    return listing


def _read_members(
    file: BinaryIO, file_size: int, shown_name: str, samples: dict[str, _Sample], listing: Listing
) -> None:
    headers = cast(BinaryIO, _HeaderReader(file))
    with tarfile.open(fileobj=headers, mode="r:", encoding="utf-8") as archive:
        last_offset = -1
        while (member := archive.next()) is not None:
            # tarfile keeps all that it has seen, a kilobyte each.
            archive.members.clear()  # type: ignore[attr-defined]
            if member.offset <= last_offset or member.size < 0:
                raise ValueError(f"the header at byte {member.offset} points backwards")
            last_offset = member.offset
            reason = _add_member(member, samples, file_size)
            if reason:
                listing.skip(f"{shown_name}!{member.name}", reason)
        # tarfile takes any broken header for the end; a true end is a block of zeros or no block.
        file.seek(archive.offset)
        if any(file.read(_BLOCK)):
            raise ValueError(f"no valid header at byte {archive.offset}")


def _add_member(member: tarfile.TarInfo, samples: dict[str, _Sample], file_size: int) -> str:
    """Adds a member to its sample; returns why not, or an empty string."""
    path = PurePosixPath(member.name)
    suffix = path.suffix.lower()
    known = suffix in (*IMAGE_SUFFIXES, *OTHER_IMAGE_SUFFIXES, *_TEXT_SUFFIXES)
    if member.isdir() or path.name.startswith(".") or not known:
        return ""
    reason = _refusal(member, suffix, file_size)
    if reason:
        return reason
    sample = samples.setdefault(str(path.with_suffix("")), _Sample())
    if suffix in OTHER_IMAGE_SUFFIXES:
        sample.other_image = path.name
        return ""
    span = _Span(str(path), member.offset_data, member.size)
    if suffix in _TEXT_SUFFIXES and suffix not in sample.texts:
        sample.texts[suffix] = span
    elif suffix in IMAGE_SUFFIXES and sample.image is None:
        sample.image = span
    else:
        return "a second member for the same key"
    return ""


def _refusal(member: tarfile.TarInfo, suffix: str, file_size: int) -> str:
    limit = MAX_TEXT_BYTES if suffix in _TEXT_SUFFIXES else MAX_IMAGE_BYTES
    if leads_outside(member.name):
        return "its name leads out of the archive"
    if not member.isreg() or member.issparse():
        return "not a regular file (link, device or sparse file)"
    if not is_unicode(member.name):
        return "its name is not valid Unicode"
    if member.size > limit:
        return f"{member.size} bytes, expected at most {limit}"
    return "cut off by the end of the tar" if member.offset_data + member.size > file_size else ""


def _add_sample(
    key: str,
    sample: _Sample,
    file: BinaryIO,
    tar_path: Path,
    shown_name: str,
    text_columns: Sequence[str],
    listing: Listing,
) -> None:
    if sample.image is None:
        other = sample.other_image
        reason = "no image for this key" if other is None else other_format_reason(other)
        listing.skip(f"{shown_name}!{key}", reason)
        return
    path = f"{shown_name}!{sample.image.name}"
    try:
        fields = _read_json(file, sample.texts.get(".json"))
        captions = _captions_of(file, sample.texts.get(".txt"), fields, text_columns)
    except ValueError as error:
        listing.skip(path, str(error))
        return
    if not captions:
        without = "no .txt or .json for this key, or an empty one"
        listing.skip(path, no_caption_reason(fields, text_columns) if fields else without)
        return
    split = fields.get("split")
    listing.pairs.append(
        RawPair(
            path=path,
            captions=captions,
            attributes={key: fields[key] for key in fields if key not in text_columns},
            split=split if isinstance(split, str) else None,
            file=str(tar_path.resolve()),
            offset=sample.image.offset,
            size=sample.image.size,
        )
    )


def _captions_of(
    file: BinaryIO, span: _Span | None, fields: dict[str, Any], text_columns: Sequence[str]
) -> tuple[str, ...]:
    captions = collect_captions(fields, text_columns)
    lines = lines_of_captions(_read_span(file, span)) if span else ()
    # img2dataset writes the same caption twice; a line end inside it must not make it new ones.
    if collapse(" ".join(lines)) in captions:
        return captions
    return tuple(dict.fromkeys([*captions, *lines]))


def _read_json(file: BinaryIO, span: _Span | None) -> dict[str, Any]:
    if span is None:
        return {}
    try:
        return parse_object(_read_span(file, span))
    except ValueError as error:
        raise ValueError(f"{span.name} is {error}") from error


def _read_span(file: BinaryIO, span: _Span) -> bytes:
    file.seek(span.offset)
    return file.read(span.size)
