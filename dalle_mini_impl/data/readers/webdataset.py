"""WebDataset tars as img2dataset writes them: ``key.jpg``, ``key.txt``, ``key.json`` side by side.

Nothing is ever unpacked or unpickled. Only the member table is read; regular members with one of
eight extensions count, everything else is passed over, and images are later read in place.
"""

import tarfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from dalle_mini_impl.data.readers.captions import (
    ReadOptions,
    clean,
    collect_captions,
    lines_of_captions,
    no_caption_reason,
)
from dalle_mini_impl.data.readers.paths import is_unicode, leads_outside
from dalle_mini_impl.data.readers.records import (
    IMAGE_SUFFIXES,
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    OTHER_IMAGE_SUFFIXES,
    Pair,
    Pairs,
    other_fields,
    other_format_reason,
    parse_object,
    split_field,
)

_LINES_SUFFIXES = (".txt", ".caption")
_TEXT_SUFFIXES = (*_LINES_SUFFIXES, ".json")
_KEY_RULE = (
    "the name up to its last dot, or to its first; of several, data.image_column and "
    "data.caption_columns choose by what follows the key"
)
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


def read_tar(path: Path, options: ReadOptions, *, name: str = "") -> Pairs:
    """List the captioned images of one uncompressed tar, in its order.

    Captions come from the caption columns of ``key.json`` and the lines of ``key.txt``. The key is
    the member's path without its last extension; what is incomplete by this rule is joined by the
    webdataset library's own, which cuts at the first dot of the name. Links, devices, sparse or
    oversized members, names that lead outside and incomplete samples are skipped; so is what lies
    behind a damaged header.
    ``name`` stands before ``!`` in the keys; by default that of the file.
    """
    pairs = Pairs()
    try:
        with path.open("rb") as file:
            reader = _TarReader(path, name or path.name, file, options, pairs)
            try:
                reader.read_members()
            finally:  # what lies before the damage is good
                reader.join_by_first_dot()
                for key, sample in reader.samples.items():
                    reader.add_sample(key, sample)
    except Exception as error:  # tarfile raises nearly anything when a header is damaged
        pairs.skip(
            name or path.name, f"not a tar file, or damaged ({type(error).__name__}: {error})"
        )
    return pairs


class _TarReader:
    """Reads the member table of one tar, then the texts of each sample."""

    def __init__(
        self, path: Path, name: str, file: BinaryIO, options: ReadOptions, pairs: Pairs
    ) -> None:
        self.path, self.name, self.file = path, name, file
        self.options, self.pairs = options, pairs
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
                    self.pairs.skip(f"{self.name}!{member.name}", reason)
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

    def join_by_first_dot(self) -> None:
        """Give ``s.outputs.txt`` to ``s.input.png``, as the webdataset library does."""
        groups: dict[str, list[str]] = defaultdict(list)
        for key in self.samples:
            groups[_first_dot_key(key)].append(key)
        for keys in groups.values():
            images = [key for key in keys if self.samples[key].image]
            named = [key for key in images if self._extension(key) == self.options.image_column]
            if named:  # the other images of the sample are not asked for
                for key in set(images) - set(named):
                    del self.samples[key]
                images = named
            bare = [key for key in images if not self.samples[key].texts] or images
            # Dotted names of several images: nobody knows whose text it is.
            if len(bare) == 1:
                self._join(bare[0], [key for key in keys if self._is_text_alone(key)])

    def _is_text_alone(self, key: str) -> bool:
        sample = self.samples.get(key)
        return sample is not None and sample.image is None and sample.other_image is None

    def _extension(self, key: str) -> str:
        """Return what webdataset calls the extension of a sample's image: "input.png"."""
        image = self.samples[key].image
        return PurePosixPath(image.name).name.partition(".")[2].lower() if image else ""

    def _join(self, image: str, texts: list[str]) -> None:
        """Move texts without image to an image."""
        own = self.samples[image].texts
        for suffix in _TEXT_SUFFIXES:
            found = [key for key in texts if suffix in self.samples[key].texts]
            # Of "s.prompt.txt" and "s.negative.txt" the one that is a caption column.
            named = [key for key in found if key.rpartition(".")[2] in self.options.caption_columns]
            if suffix in own or len(named or found) != 1:
                continue
            own[suffix] = self.samples[(named or found)[0]].texts[suffix]
            for key in found:
                del self.samples[key].texts[suffix]
        for key in texts:
            if not self.samples[key].texts:
                del self.samples[key]

    def add_sample(self, key: str, sample: _Sample) -> None:
        """List a sample that has image and caption, or say what it lacks."""
        if sample.image is None:
            other = sample.other_image
            reason = (
                f"no image for this key ({_KEY_RULE})"
                if other is None
                else other_format_reason(other)
            )
            self.pairs.skip(f"{self.name}!{key}", reason)
            return
        path = f"{self.name}!{sample.image.name}"
        fields: dict[str, Any] = {}
        captions: tuple[str, ...] = ()
        try:
            fields = self._read_json(sample.texts.get(".json"))
            captions = self._captions_of(sample, fields)
            reason = "no .txt or .json for this key, or an empty one"
            if fields:
                reason = no_caption_reason(fields, self.options.caption_columns)
        except ValueError as error:
            reason = str(error)
        pair = Pair(
            path=path,
            captions=captions,
            attributes=other_fields(fields, self.options.caption_columns),
            split=split_field(fields),
            file=str(self.path.resolve()),
            offset=sample.image.offset,
            size=sample.image.size,
        )
        self.pairs.add(pair, reason)

    def _captions_of(self, sample: _Sample, fields: dict[str, Any]) -> tuple[str, ...]:
        # The JSON comes first: its fields are in a known order.
        captions = collect_captions(fields, self.options.caption_columns)
        for suffix in _LINES_SUFFIXES:
            span = sample.texts.get(suffix)
            lines = lines_of_captions(self._read_span(span)) if span else ()
            # img2dataset writes the same caption twice; a line end inside it must not make it new
            # ones.
            if clean(" ".join(lines)) not in captions:
                captions = tuple(dict.fromkeys([*captions, *lines]))
        return captions

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


def _first_dot_key(key: str) -> str:
    path = PurePosixPath(key)
    return str(path.with_name(path.name.partition(".")[0] or path.name))
