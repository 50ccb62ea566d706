"""Metadata files of image folders: ``metadata.jsonl``, ``metadata.csv``, ``metadata.parquet``."""

import csv
import json
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from dalle_mini_impl.data.readers.captions import (
    ReadOptions,
    collect_captions,
    no_caption_reason,
)
from dalle_mini_impl.data.readers.parquet import check_expansion
from dalle_mini_impl.data.readers.paths import (
    Places,
    check_file,
    encoding_remedy,
    is_inside,
    is_unicode,
    leads_outside,
)
from dalle_mini_impl.data.readers.records import (
    MAX_TEXT_BYTES,
    Pair,
    Pairs,
    other_fields,
    parse_object,
    split_field,
)
from dalle_mini_impl.errors import UserError

METADATA_NAME = "metadata.jsonl"
METADATA_NAMES = (METADATA_NAME, "metadata.csv", "metadata.parquet")
_NAME_FIELDS = ("file_name", "image")
JSON_REMEDY = (
    "write one object per line: python -c 'import json; "
    '[print(json.dumps(row)) for row in json.load(open("OLD"))]\' > metadata.jsonl'
)


def find_metadata(folder: Path) -> Path | None:
    """Find the metadata file of a folder."""
    return next((folder / name for name in METADATA_NAMES if (folder / name).is_file()), None)


def read_metadata(file: Path, places: Places, options: ReadOptions) -> Pairs:
    """List the images that a metadata file names, relative to the first one of the places.

    A row is an object with ``file_name``, captions and the like. Rows with the same ``file_name``
    are one image with the captions of all of them. Missing images are skipped.

    Raises:
        UserError: A row has no ``file_name``, a name leads out of the folder, or one image is put
            in two splits. The message names file and line.
    """
    try:
        check_file(file, places)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
    pairs = Pairs()
    known: dict[str, Pair] = {}
    reasons: dict[str, str] = {}
    prefix = file.parent.relative_to(places[0]).as_posix()
    for place, fields in _rows_of(file):
        # A bad row is an error, since it hides which image it names; a bad image is skipped.
        field, name = _image_name(fields, file.parent, place, places, options.image_column)
        key = posixpath.normpath(posixpath.join(prefix, name))
        path = file.parent / name
        captions = collect_captions(fields, options.caption_columns)
        if not os.path.isfile(path):  # unlike Path.is_file, never raises
            pairs.skip(key, "the image file is missing")
            continue
        reasons[key] = no_caption_reason(fields, options.caption_columns)
        attributes = other_fields(fields, (field, *options.caption_columns))
        pair = Pair(key, captions, attributes, split_field(fields), str(path))
        known[key] = _merge(known[key], pair, place) if key in known else pair
    for key, pair in known.items():
        pairs.add(pair, reasons[key])
    return pairs


def write_metadata(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``metadata.jsonl``, whole or not at all: one row, with ``file_name``, per image."""
    temporary = folder / f"{METADATA_NAME}.tmp"
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, folder / METADATA_NAME)


def _rows_of(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the rows of a metadata file, each with its place for messages."""
    if file.suffix == ".jsonl":
        return _rows_of_jsonl(file)
    return _rows_of_csv(file) if file.suffix == ".csv" else _rows_of_parquet(file)


def _rows_of_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        # Of a longer line only the beginning is read: it may be as long as the disk.
        for number, line in enumerate(iter(lambda: file.readline(MAX_TEXT_BYTES + 1), b""), 1):
            place = f"{path}, line {number}"
            if len(line) <= MAX_TEXT_BYTES and not line.strip():
                continue
            if number == 1 and line.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                raise UserError(
                    f"{place}: a JSON array, expected an object {{...}} on each line; rename it to "
                    f"old.json and {JSON_REMEDY.replace('OLD', 'old.json')}"
                )
            try:
                yield place, parse_object(line)
            except ValueError as error:
                hint = "; expected one object per line" if len(line) > MAX_TEXT_BYTES else ""
                raise UserError(f"{place}: {error}{hint}") from error


def _rows_of_csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(_bounded_lines(file), strict=True)
            for row in reader:
                place = f"{path}, line {reader.line_num}"
                if None in row:
                    raise UserError(
                        f"{place}: got {len(row[None])} cells too many, expected those of the "
                        'first line; a text with commas stands in "..."'
                    )
                yield place, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a CSV file in UTF-8 ({error})") from None


def _bounded_lines(file: TextIO) -> Iterator[str]:
    while line := file.readline(MAX_TEXT_BYTES + 1):
        if len(line) > MAX_TEXT_BYTES:
            raise csv.Error(f"a line longer than {MAX_TEXT_BYTES} characters")
        yield line


def _rows_of_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow.parquet as pq
    import pyarrow.types as kinds

    check_expansion(path)
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            # Bytes are no text, and no attribute.
            schema = file.schema_arrow
            columns = [each.name for each in schema if not kinds.is_binary(each.type)]
            for batch in file.iter_batches(columns=columns, batch_size=1000):
                for row in batch.to_pylist():
                    # Dates and decimals become text: a run keeps attributes as JSON.
                    yield f"{path}, row {number}", json.loads(json.dumps(row, default=str))
                    number += 1
    except UserError:
        raise
    except Exception as error:  # pyarrow raises many types for a damaged file
        raise UserError(f"cannot read {path} as parquet: {type(error).__name__}") from error


def _image_name(
    fields: dict[str, Any], folder: Path, place: str, places: Places, image_column: str | None
) -> tuple[str, str]:
    """Return the field that names the image file, and the name."""
    choices = _NAME_FIELDS if image_column is None else (image_column,)
    field = next((each for each in choices if each in fields), choices[0])
    name = fields.get(field)
    if not isinstance(name, str) or not name or not is_unicode(name):
        has = "" if field in fields else f"; it has {', '.join(map(repr, list(fields)[:20]))}"
        raise UserError(
            f"{place}: {field} is {repr(name)[:200]}, expected the name of an image file{has}; "
            "data.image_column names another field"
        )
    # Where the system is not UTF-8, the file cannot even be asked for.
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        raise UserError(f"{place}: no file is named {name!r}{encoding_remedy()}") from None
    if leads_outside(name) or not is_inside(folder / name, places):
        raise UserError(f"{place}: {field} {name!r} leads out of the folder {folder}")
    # As Windows writes it.
    if "\\" in name and not os.path.exists(folder / name):
        name = name.replace("\\", "/")
        if not is_inside(folder / name, places):
            raise UserError(f"{place}: {field} {name!r} leads out of the folder {folder}")
    return field, name


def _merge(first: Pair, second: Pair, place: str) -> Pair:
    if first.split != second.split:
        # The same image to train on and to measure with would be a leak.
        raise UserError(
            f"{place}: {second.path} is in split {second.split!r}, but in {first.split!r} above"
        )
    # The first line wins where both name an attribute.
    captions = tuple(dict.fromkeys([*first.captions, *second.captions]))
    return replace(first, captions=captions, attributes=second.attributes | first.attributes)
