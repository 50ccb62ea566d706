"""Folders of image files, with captions in ``metadata.jsonl`` or in a text file beside each."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dalle_mini_impl.data.readers.records import (
    IMAGE_SUFFIXES,
    MAX_TEXT_BYTES,
    OTHER_IMAGE_SUFFIXES,
    Pair,
    Pairs,
    collect_captions,
    encoding_remedy,
    files_below,
    is_inside,
    is_unicode,
    leads_outside,
    lines_of_captions,
    no_caption_reason,
    other_fields,
    other_format_reason,
    parse_object,
    split_field,
)
from dalle_mini_impl.errors import UserError

METADATA_NAME = "metadata.jsonl"


def read_metadata_folder(folder: Path, text_columns: Sequence[str]) -> Pairs:
    """List a folder with ``metadata.jsonl``: an object per line, with ``file_name`` and captions.

    Lines with the same ``file_name`` are one image with the captions of all of them. Missing images
    and those without captions are skipped.

    Raises:
        UserError: A line is not a JSON object with a ``file_name``, a name leads out of the folder,
            or one image is put in two splits. The message names file and line.
    """
    root = folder.resolve()
    pairs = Pairs()
    known: dict[str, Pair] = {}
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
            # A bad line is an error, since it hides which image it names; a bad image is skipped.
            name = _image_name(fields, root, place)
            captions = collect_captions(fields, text_columns)
            if not captions:
                pairs.skip(name, no_caption_reason(fields, text_columns))
            elif not os.path.isfile(root / name):  # unlike Path.is_file, never raises
                pairs.skip(name, "the image file is missing")
            else:
                attributes = other_fields(fields, ("file_name", *text_columns))
                file_path = str(root / name)
                pair = Pair(name, captions, attributes, split_field(fields), file_path)
                known[name] = _merge(known[name], pair, place) if name in known else pair
    pairs.listed = list(known.values())
    return pairs


def write_metadata(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``metadata.jsonl``, whole or not at all: one row, with ``file_name``, per image."""
    temporary = folder / f"{METADATA_NAME}.tmp"
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, folder / METADATA_NAME)


def _image_name(fields: dict[str, Any], root: Path, place: str) -> str:
    name = fields.get("file_name")
    if not isinstance(name, str) or not name or not is_unicode(name):
        raise UserError(f"{place}: file_name is {name!r}, expected the name of an image file")
    # Where the system is not UTF-8, the file cannot even be asked for.
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        raise UserError(f"{place}: no file is named {name!r}{encoding_remedy()}") from None
    if leads_outside(name) or not is_inside(root / name, root):
        raise UserError(f"{place}: file_name {name!r} leads out of the folder {root}")
    return name


def _merge(first: Pair, second: Pair, place: str) -> Pair:
    if first.split != second.split:
        # The same image to train on and to measure with would be a leak.
        raise UserError(
            f"{place}: {second.path} is in split {second.split!r}, but in {first.split!r} above"
        )
    # The first line wins where both name an attribute.
    captions = tuple(dict.fromkeys([*first.captions, *second.captions]))
    return replace(first, captions=captions, attributes=second.attributes | first.attributes)


def read_sidecar_folder(folder: Path) -> Pairs:
    """List a folder with ``x.txt`` beside each ``x.jpg``, at any depth, one caption per line.

    Hidden files and folders (names with a leading dot) and linked folders are passed over. Images
    without a readable caption file, and links out of the folder, are skipped. Keys are relative
    paths, so equal names in two sub-folders stay apart.
    """
    root = folder.resolve()
    pairs = Pairs()
    for parent, names in files_below(root):
        _list_one_folder(parent, names, root, pairs)
    return pairs


def _list_one_folder(parent: Path, names: list[str], root: Path, pairs: Pairs) -> None:
    images = [name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    # "a.JPG" belongs to "a.TXT", but not to "A.txt": suffixes in any case, stems exactly.
    texts = {Path(name).stem: name for name in names if Path(name).suffix.lower() == ".txt"}
    for name in images:
        path = parent / name
        key = path.relative_to(root).as_posix()
        # The usual name, for a message on what is missing.
        text_name = texts.get(path.stem, f"{path.stem}.txt")
        try:
            _check_file(path, root)
            captions = _read_caption_file(parent / text_name, root)
        except (OSError, ValueError) as error:
            pairs.skip(key, str(error))
            continue
        pairs.listed.append(Pair(key, captions, file=str(path)))
    stems = {Path(name).stem for name in images}
    others = {
        Path(name).stem: name for name in names if Path(name).suffix.lower() in OTHER_IMAGE_SUFFIXES
    }
    for stem, name in texts.items():
        if stem not in stems:
            key = (parent / name).relative_to(root).as_posix()
            other = others.get(stem)
            reason = "no image of the same name beside this text"
            pairs.skip(key, reason if other is None else other_format_reason(other))


def _check_file(path: Path, root: Path) -> None:
    if not is_unicode(str(path)):
        raise ValueError(f"its path is not valid Unicode{encoding_remedy()}")
    # Links within the folder are fine; a stranger's data set must not show files of ours.
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
