"""Captioned images from any of five kinds of source, as one indexable object.

1. A folder with ``metadata.jsonl``: a JSON object per line with ``file_name``, captions and the
like.
2. A folder with ``x.txt`` beside each ``x.jpg``, at any depth, one caption per line.
3. A WebDataset tar, or a folder of tars, as img2dataset writes them.
4. A parquet file, or a folder of them, with a column of encoded images.
5. The name of a data set on the Hugging Face Hub, ``user/name``.
"""

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

from dalle_mini_impl.data.readers.folder import (
    METADATA_NAME,
    read_metadata_folder,
    read_sidecar_folder,
)
from dalle_mini_impl.data.readers.parquet import (
    IMAGE_COLUMN,
    parquet_files,
    read_hub,
    read_parquet,
)
from dalle_mini_impl.data.readers.records import Pair, Pairs, SkippedRecord, printable
from dalle_mini_impl.data.readers.webdataset import read_tar
from dalle_mini_impl.data.splits import choose_split, split_names
from dalle_mini_impl.errors import UserError

__all__ = [
    "TEXT_COLUMNS",
    "Pair",
    "Pairs",
    "SkippedRecord",
    "is_hub_name",
    "open_all_splits",
    "open_pairs",
]

TEXT_COLUMNS = ("text", "text_ko", "caption", "texts", "texts_ko")  # main captions first
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def open_pairs(
    source: str, *, split: str | None = None, text_columns: Sequence[str] = TEXT_COLUMNS
) -> Pairs:
    """Open one split of a source of captioned images, or all of it, whatever its kind.

    Splits are those the source names: a ``split`` field in the metadata, JSON members or columns,
    or the splits of a table. Where it names none, 5 % are held out as "val"; see ``splits``.
    ``text_columns`` are the fields that hold captions (strings or lists of strings), in their
    order.

    Raises:
        UserError: Nothing there, no captioned images, a broken metadata line, no such split.
    """
    pairs = _list_source(source, text_columns)
    return dataclasses.replace(pairs, listed=choose_split(source, pairs.listed, split))


def open_all_splits(
    source: str, *, text_columns: Sequence[str] = TEXT_COLUMNS
) -> tuple[Pairs, list[str]]:
    """Open everything in a source, and name the split of each image; see ``open_pairs``.

    Raises:
        UserError: As ``open_pairs``.
    """
    pairs = _list_source(source, text_columns)
    return pairs, split_names(pairs.listed)


def _list_source(source: str, text_columns: Sequence[str]) -> Pairs:
    pairs = _choose_reader(source, text_columns)
    if not pairs.listed:
        # Reasons of the first records: an empty list alone would leave the user guessing.
        first = "; ".join(f"{record.path}: {record.reason}" for record in pairs.skipped[:3])
        raise UserError(
            f"no captioned images found in {source}{f' ({first})' if first else ''}, expected "
            f"one of: a folder with {METADATA_NAME} (file_name, text), a folder with x.txt beside "
            "each x.jpg, WebDataset tars with key.jpg and key.txt, parquet files with columns "
            f"{IMAGE_COLUMN} and text, a Hub data set user/name"
        )
    pairs.num_records = len(pairs.listed) + len(pairs.skipped)
    return pairs


def _choose_reader(source: str, text_columns: Sequence[str]) -> Pairs:
    if not source.strip():
        raise UserError(f"source is {source!r}, expected a folder, a file or a Hub name")
    path = Path(os.path.expanduser(source))
    suffix = path.suffix.lower()
    # The tests of os.path, unlike those of Path, never raise: a source may be any text.
    if os.path.isdir(path):
        return _read_folder(path, text_columns)
    if os.path.isfile(path) and suffix == ".tar":
        return read_tar(path, text_columns)
    if os.path.isfile(path) and suffix == ".parquet":
        return read_parquet(path, text_columns)
    if os.path.exists(path):
        raise UserError(f"{source} is no folder, .tar or .parquet file")
    # "data/x.tar" is a missing file, not a data set of that name.
    is_file_name = suffix in (".tar", ".parquet", ".jsonl")
    if is_hub_name(source) and not is_file_name:
        return read_hub(source, text_columns)
    raise UserError(f"no folder or file {printable(source)[:1000]}")


def is_hub_name(source: str) -> bool:
    """Tell a name on the Hugging Face Hub, owner/name, from a mistyped path.

    It is none if the folder above is there.
    """
    parent = os.path.dirname(os.path.expanduser(source))
    return _HUB_NAME.fullmatch(source) is not None and not os.path.exists(parent)


def _read_folder(folder: Path, text_columns: Sequence[str]) -> Pairs:
    # The most explicit form wins.
    if (folder / METADATA_NAME).is_file():
        return read_metadata_folder(folder, text_columns)
    # Sorted, since the order of a folder differs between file systems.
    tars = sorted(path for path in folder.glob("*.tar") if path.is_file())
    if tars:
        pairs = Pairs()
        for tar in tars:
            part = read_tar(tar, text_columns)
            pairs.listed += part.listed
            pairs.skipped += part.skipped
        return pairs
    pairs = read_sidecar_folder(folder)
    # img2dataset leaves parquet files of statistics beside its images, so images go first.
    if not pairs.listed and parquet_files(folder):
        return read_parquet(folder, text_columns)
    return pairs
