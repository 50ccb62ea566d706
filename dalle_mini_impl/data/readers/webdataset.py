"""WebDataset tars as img2dataset writes them: ``key.jpg``, ``key.txt``, ``key.json`` side by side.

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
    Pair,
    Pairs,
    collapse,
    collect_captions,
    is_unicode,
    leads_outside,
    lines_of_captions,
    no_caption_reason,
    other_fields,
    other_format_reason,
    parse_object,
    split_field,
)

_TEXT_SUFFIXES = (".txt", ".json")
_BLOCK = 512  # bytes, the unit of tar files
_MAX_HEADER_BYTES = 2**14  # of long names and pax headers; Python 3.11.7 takes 0.5 s for that many


@dataclass(frozen=True)
class _Span:
    name: str
    offset: int
    size: int


class _HeaderReader:
    """A tar file for ``tarfile``, which would read a long name or a pax header of any size."""

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


def read_tar(path: Path, text_columns: Sequence[str]) -> Pairs:
    """List the captioned images of one uncompressed tar, in its order.

    Captions come from the text columns of ``key.json`` and the lines of ``key.txt``. The key is the
    member's path without its last extension. Links, devices, sparse or oversized members, names
    that lead outside and incomplete samples are skipped; so is what lies behind a damaged header.
    """
    pairs = Pairs()
    try:
        with path.open("rb") as file:
            reader = _TarReader(path, file, text_columns, pairs)
            try:
                reader.read_members()
            finally:  # what lies before the damage is good
                for key, sample in reader.samples.items():
                    reader.add_sample(key, sample)
    except Exception as error:  # tarfile raises nearly anything when a header is damaged
        pairs.skip(path.name, f"not a tar file, or damaged ({type(error).__name__}: {error})")
    return pairs


class _TarReader:
    """Reads the member table of one tar, then the texts of each sample."""

    def __init__(
        self, path: Path, file: BinaryIO, text_columns: Sequence[str], pairs: Pairs
    ) -> None:
        self.path, self.file, self.text_columns, self.pairs = path, file, text_columns, pairs
        self.file_size = path.stat().st_size
        self.samples: dict[str, _Sample] = {}

    def read_members(self) -> None:
        headers = cast(BinaryIO, _HeaderReader(self.file))
        with tarfile.open(fileobj=headers, mode="r:", encoding="utf-8") as archive:
            last_offset = -1
            while (member := archive.next()) is not None:
                # tarfile keeps all that it has seen, a kilobyte each.
                archive.members.clear()  # type: ignore[attr-defined]
                # A size below zero leads back to an earlier header, and so into a loop.
                if member.offset <= last_offset or member.size < 0:
                    raise ValueError(f"the header at byte {member.offset} points backwards")
                last_offset = member.offset
                reason = self._add_member(member)
                if reason:
                    self.pairs.skip(f"{self.path.name}!{member.name}", reason)
            # tarfile takes any broken header for the end; a true end is a block of zeros or none.
            self.file.seek(archive.offset)
            if any(self.file.read(_BLOCK)):
                raise ValueError(f"no valid header at byte {archive.offset}")

    def _add_member(self, member: tarfile.TarInfo) -> str:
        """Add a member to its sample; return why not, or an empty string."""
        # Everything of an unknown kind is passed over: pickles, classes, npy.
        path = PurePosixPath(member.name)
        suffix = path.suffix.lower()
        known = suffix in (*IMAGE_SUFFIXES, *OTHER_IMAGE_SUFFIXES, *_TEXT_SUFFIXES)
        if member.isdir() or path.name.startswith(".") or not known:
            return ""
        reason = self._refusal(member, suffix)
        if reason:
            return reason
        # Members of a key need not stand next to each other, although the format says so.
        sample = self.samples.setdefault(str(path.with_suffix("")), _Sample())
        if suffix in OTHER_IMAGE_SUFFIXES:
            sample.other_image = path.name
            return ""
        # Only places are kept: a shard of gigabytes is listed in little memory.
        span = _Span(str(path), member.offset_data, member.size)
        if suffix in _TEXT_SUFFIXES and suffix not in sample.texts:
            sample.texts[suffix] = span
        elif suffix in IMAGE_SUFFIXES and sample.image is None:
            sample.image = span
        else:
            return "a second member for the same key"
        return ""

    def _refusal(self, member: tarfile.TarInfo, suffix: str) -> str:
        limit = MAX_TEXT_BYTES if suffix in _TEXT_SUFFIXES else MAX_IMAGE_BYTES
        if leads_outside(member.name):
            return "its name leads out of the archive"
        if not member.isreg() or member.issparse():
            return "not a regular file (link, device or sparse file)"
        if not is_unicode(member.name):
            return "its name is not valid Unicode"
        if member.size > limit:
            return f"{member.size} bytes, expected at most {limit}"
        # Checked now: random access would find it only in the middle of training.
        is_cut_off = member.offset_data + member.size > self.file_size
        return "cut off by the end of the tar" if is_cut_off else ""

    def add_sample(self, key: str, sample: _Sample) -> None:
        """List a sample that has image and caption, or say what it lacks."""
        if sample.image is None:
            other = sample.other_image
            reason = "no image for this key" if other is None else other_format_reason(other)
            self.pairs.skip(f"{self.path.name}!{key}", reason)
            return
        path = f"{self.path.name}!{sample.image.name}"
        try:
            fields = self._read_json(sample.texts.get(".json"))
            captions = self._captions_of(sample.texts.get(".txt"), fields)
        except ValueError as error:
            self.pairs.skip(path, str(error))
            return
        if not captions:
            without = "no .txt or .json for this key, or an empty one"
            reason = no_caption_reason(fields, self.text_columns) if fields else without
            self.pairs.skip(path, reason)
            return
        self.pairs.listed.append(
            Pair(
                path=path,
                captions=captions,
                attributes=other_fields(fields, self.text_columns),
                split=split_field(fields),
                file=str(self.path.resolve()),
                offset=sample.image.offset,
                size=sample.image.size,
            )
        )

    def _captions_of(self, span: _Span | None, fields: dict[str, Any]) -> tuple[str, ...]:
        # The JSON comes first: its fields are in a known order.
        captions = collect_captions(fields, self.text_columns)
        lines = lines_of_captions(self._read_span(span)) if span else ()
        # img2dataset writes the same caption twice; a line end inside it must not make it new ones.
        if collapse(" ".join(lines)) in captions:
            return captions
        return tuple(dict.fromkeys([*captions, *lines]))

    def _read_json(self, span: _Span | None) -> dict[str, Any]:
        if span is None:
            return {}
        try:
            return parse_object(self._read_span(span))
        except ValueError as error:
            raise ValueError(f"{span.name} is {error}") from error

    def _read_span(self, span: _Span) -> bytes:
        self.file.seek(span.offset)
        return self.file.read(span.size)
