"""Folders of image files, with captions in `metadata.jsonl` or in a text file beside each."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dalle_mini_impl.data.readers.records import (
    IMAGE_SUFFIXES,
    MAX_TEXT_BYTES,
    OTHER_IMAGE_SUFFIXES,
    Listing,
    RawPair,
    collect_captions,
    encoding_remedy,
    files_below,
    is_inside,
    is_unicode,
    leads_outside,
    lines_of_captions,
    no_caption_reason,
    other_format_reason,
    parse_object,
)
from dalle_mini_impl.errors import UserError

METADATA_NAME = "metadata.jsonl"


def read_metadata_folder(folder: Path, text_columns: Sequence[str]) -> Listing:
    """Lists a folder with `metadata.jsonl`: a JSON object per line, with `file_name` and captions.

    Lines with the same `file_name` are one image with the captions of all of them.

    Args:
        folder: The folder; file names are relative to it.
        text_columns: Fields that hold captions.

    Returns:
        Images in the order of the file. Missing ones and those without captions are skipped.

    Raises:
        UserError: A line is not a JSON object with a `file_name`, a name leads out of the folder,
            or one image is put in two splits. The message names file and line.
    """
    root = folder.resolve()
    listing = Listing()
    known: dict[str, RawPair] = {}
    metadata = folder / METADATA_NAME
    with metadata.open("rb") as file:
        # Of a longer line only the beginning is read: it may be as long as the disk.
        for number, line in enumerate(iter(lambda: file.readline(MAX_TEXT_BYTES + 1), b""), 1):
            if len(line) <= MAX_TEXT_BYTES and not line.strip():
                continue
            place = f"{metadata}, line {number}"
            try:
                fields = parse_object(line)
            except ValueError as error:
                raise UserError(f"{place}: {error}") from error
            name = _image_name(fields, root, place)
            captions = collect_captions(fields, text_columns)
            if not captions:
                listing.skip(name, no_caption_reason(fields, text_columns))
            elif not os.path.isfile(root / name):  # unlike Path.is_file, never raises
                listing.skip(name, "the image file is missing")
            else:
                pair = _pair_of(name, captions, fields, text_columns, root)
                known[name] = _merge(known[name], pair, place) if name in known else pair
    listing.pairs = list(known.values())
    return listing


def _image_name(fields: dict[str, Any], root: Path, place: str) -> str:
    name = fields.get("file_name")
    if not isinstance(name, str) or not name or not is_unicode(name):
        raise UserError(f"{place}: file_name is {name!r}, expected the name of an image file")
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        raise UserError(f"{place}: no file is named {name!r}{encoding_remedy()}") from None
    if leads_outside(name) or not is_inside(root / name, root):
        raise UserError(f"{place}: file_name {name!r} leads out of the folder {root}")
    return name


def _pair_of(
    name: str,
    captions: tuple[str, ...],
    fields: dict[str, Any],
    text_columns: Sequence[str],
    root: Path,
) -> RawPair:
    used = {"file_name", *text_columns}
    attributes = {key: value for key, value in fields.items() if key not in used}
    split = fields.get("split")
    return RawPair(
        path=name,
        captions=captions,
        attributes=attributes,
        split=split if isinstance(split, str) else None,
        file=str(root / name),
    )


def _merge(first: RawPair, second: RawPair, place: str) -> RawPair:
    if first.split != second.split:
        # The same image to train on and to measure with would be a leak.
        raise UserError(
            f"{place}: {second.path} is in split {second.split!r}, but in {first.split!r} above"
        )
    return RawPair(
        path=first.path,
        captions=tuple(dict.fromkeys([*first.captions, *second.captions])),
        attributes=second.attributes | first.attributes,
        split=first.split,
        file=first.file,
    )


def read_sidecar_folder(folder: Path) -> Listing:
    """Lists a folder with `x.txt` beside each `x.jpg`, at any depth, one caption per line.

    Hidden files and folders (names with a leading dot) and linked folders are passed over.

    Args:
        folder: The folder; its relative paths are the keys, so equal names in two sub-folders
            stay apart.

    Returns:
        Images by path. Those without a readable caption file, and links out of the folder, are
        skipped.
    """
    root = folder.resolve()
    listing = Listing()
    for parent, names in files_below(root):
        _list_one_folder(parent, names, root, listing)
    return listing


def _list_one_folder(parent: Path, names: list[str], root: Path, listing: Listing) -> None:
    images = [name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    texts = {Path(name).stem: name for name in names if Path(name).suffix.lower() == ".txt"}
    for name in images:
        path = parent / name
        key = path.relative_to(root).as_posix()
        text_name = texts.get(path.stem, f"{path.stem}.txt")
        try:
            _check_file(path, root)
            captions = _read_caption_file(parent / text_name, root)
        except (OSError, ValueError) as error:
            listing.skip(key, str(error))
            continue
        listing.pairs.append(RawPair(key, captions, attributes={}, split=None, file=str(path)))
    stems = {Path(name).stem for name in images}
    others = {
        Path(name).stem: name for name in names if Path(name).suffix.lower() in OTHER_IMAGE_SUFFIXES
    }
    for stem, name in texts.items():
        if stem not in stems:
            key = (parent / name).relative_to(root).as_posix()
            other = others.get(stem)
            reason = "no image of the same name beside this text"
            listing.skip(key, reason if other is None else other_format_reason(other))


def _check_file(path: Path, root: Path) -> None:
    if not is_unicode(str(path)):
        raise ValueError(f"its path is not valid Unicode{encoding_remedy()}")
    if path.is_symlink() and not is_inside(path, root):
        raise ValueError(f"{path.name} is a link that leads out of the folder")
    if not path.is_file():
        raise ValueError(f"no file {path.name} beside it")


def _read_caption_file(path: Path, root: Path) -> tuple[str, ...]:
    _check_file(path, root)
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise ValueError(f"{path.name} is longer than {MAX_TEXT_BYTES} bytes")
    captions = lines_of_captions(path.read_bytes())
    if not captions:
        raise ValueError(f"no caption: {path.name} is empty")
    return captions
