"""Parquet files and Hub data sets, through Hugging Face ``datasets``; images stay encoded bytes."""

import glob
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle_mini_impl.data.readers.records import (
    MAX_IMAGE_BYTES,
    Pair,
    Pairs,
    collect_captions,
    files_below,
    is_inside,
    is_unicode,
    no_caption_reason,
    other_fields,
    split_field,
)
from dalle_mini_impl.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

IMAGE_COLUMN = "image"  # encoded images: bytes, or a struct of bytes and path
# The Hub's habit: train-00000-of-00004.parquet, or test/0000.parquet.
_SPLIT_IN_NAME = re.compile(r"^(train|validation|val|dev|test)(?=$|[-_.])")

_HUB_SECONDS = 10
# Images are compressed already. What unpacks to much more was made to fill a disk.
_MAX_EXPANSION = 100
_HARMLESS_BYTES = 2**30


def read_parquet(path: Path, text_columns: Sequence[str]) -> Pairs:
    """List one parquet file, or all parquet files in a folder and below.

    A split is named by a file or first folder that begins with train, validation, val, dev, test.
    Rows without image or caption are skipped.

    Raises:
        UserError: Not readable as parquet, or no such columns.
    """
    from datasets import config, load_dataset

    root = path.resolve() if path.is_dir() else path.resolve().parent
    files: dict[str, list[str]] = defaultdict(list)
    for file in parquet_files(path):
        _check_expansion(file)
        first_part = file.relative_to(path).parts[0] if path.is_dir() else file.name
        match = _SPLIT_IN_NAME.match(first_part) or _SPLIT_IN_NAME.match(file.name)
        files[match.group(1) if match else "train"].append(glob.escape(str(file)))
    try:
        tables = load_dataset("parquet", data_files=dict(files))
    except Exception as error:  # datasets and pyarrow raise many types for a damaged file
        reason = _last_cause(error)
        if isinstance(error, OSError) and error.errno is not None:
            reason += f"; its cache is {config.HF_DATASETS_CACHE}, HF_HOME names another folder"
        raise UserError(f"cannot read {path} as parquet: {reason}") from error
    return _list_tables(tables, source=str(path), root=root, text_columns=text_columns)


def parquet_files(path: Path) -> list[Path]:
    """List the parquet files of a folder at any depth, by path; a file is its own source."""
    if not path.is_dir():
        return [path]
    names = (parent / name for parent, names in files_below(path) for name in names)
    return sorted(file for file in names if file.suffix == ".parquet" and file.is_file())


def _check_expansion(file: Path) -> None:
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(file)
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        unpacked = sum(group.total_byte_size for group in groups)
        # A value that occurs in every row is stored once, and unpacked for each row.
        packed = file.stat().st_size
        num_rows = metadata.num_rows
    except Exception:  # damaged: the reader says how
        return
    # Judged from the footer, before anything is unpacked.
    limit = max(_HARMLESS_BYTES, _MAX_EXPANSION * packed)
    if unpacked > limit or num_rows > limit:
        raise UserError(
            f"{file}: {packed} bytes that unpack to {unpacked} in {num_rows} rows, "
            f"expected at most {limit} of both"
        )


def read_hub(name: str, text_columns: Sequence[str]) -> Pairs:
    """List a data set of the Hugging Face Hub, ``user/name``, downloading it if need be.

    Raises:
        UserError: Not there, not reachable, or no such columns.
    """
    from datasets import config, load_dataset

    taken = f"no folder or file {name} here; taken as the name of a Hugging Face Hub data set"
    if not config.HF_HUB_OFFLINE:
        _check_hub_answers(taken)
    try:
        tables = load_dataset(name)
    except Exception as error:
        raise UserError(f"{taken}, which the Hub did not give: {_last_cause(error)}") from error
    # Images that are files in the download cache are allowed, files elsewhere are not.
    root = Path(config.HF_CACHE_HOME).resolve()
    return _list_tables(tables, source=name, root=root, text_columns=text_columns)


def _check_hub_answers(taken: str) -> None:
    """Ask once, without naming the data set; ``datasets`` itself tries for a minute or more."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS)
    except Exception as error:  # its HTTP library, and so the type, has changed between versions
        raise UserError(
            f"{taken}, but the Hub cannot be reached ({error}); HF_HUB_OFFLINE=1 takes a data set "
            "that was downloaded before"
        ) from error


def _last_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _list_tables(
    tables: "Mapping[str, Dataset]", *, source: str, root: Path, text_columns: Sequence[str]
) -> Pairs:
    """List the rows of all tables, one table per split; files of images must lie in ``root``."""
    from datasets import Image, concatenate_datasets

    pairs = Pairs()
    images: list[Dataset] = []
    for split, table in tables.items():
        _check_columns(table, source, text_columns)
        column = table.select_columns([IMAGE_COLUMN])
        try:
            column = column.cast_column(IMAGE_COLUMN, Image(decode=False))
        except Exception as error:  # pyarrow has a type for each way in which it cannot be done
            raise UserError(
                f"{source}: column {IMAGE_COLUMN!r} holds {column.features[IMAGE_COLUMN]}, "
                "expected encoded images (bytes)"
            ) from error
        num_bytes = _num_bytes(column)
        # Rows are counted through all tables, as concatenate_datasets will number them.
        first_row = sum(len(each) for each in images)
        for row, fields in enumerate(table.select_columns(_plain_columns(table))):
            path = f"{split} row {row}" if len(tables) > 1 else f"row {row}"
            # A row holds the bytes, or the path of a file inside the root, or nothing that is used.
            file = "" if num_bytes[row] else _image_file(column[row][IMAGE_COLUMN], root)
            captions = collect_captions(fields, text_columns)
            if file is None:
                pairs.skip(path, f"no image in column {IMAGE_COLUMN}")
            elif num_bytes[row] > MAX_IMAGE_BYTES:
                pairs.skip(path, f"{num_bytes[row]} bytes, expected at most {MAX_IMAGE_BYTES}")
            elif not captions:
                pairs.skip(path, no_caption_reason(fields, text_columns))
            else:
                pair = Pair(
                    path=path,
                    captions=captions,
                    # Dates and decimals become text: a run keeps attributes as JSON.
                    attributes=json.loads(
                        json.dumps(other_fields(fields, text_columns), default=str)
                    ),
                    split=split_field(fields) if len(tables) == 1 else split,
                    file=file,
                    offset=0 if file else first_row + row,
                )
                pairs.listed.append(pair)
        images.append(column)
    pairs.table = concatenate_datasets(images) if images else None
    return pairs


def _check_columns(table: "Dataset", source: str, text_columns: Sequence[str]) -> None:
    names = table.column_names
    if IMAGE_COLUMN not in names:
        raise UserError(f"{source} has no column {IMAGE_COLUMN!r} for images, but {names}")
    if not set(text_columns) & set(names):
        expected = ", ".join(text_columns)
        raise UserError(f"{source} has none of the columns {expected} for captions, but {names}")


def _plain_columns(table: "Dataset") -> list[str]:
    """List the columns of numbers, text, or lists of them: nothing that a library would decode."""
    from datasets import ClassLabel, LargeList, List, Value

    def is_plain(feature: Any) -> bool:
        if isinstance(feature, List | LargeList):
            return is_plain(feature.feature)
        return isinstance(feature, ClassLabel) or (
            isinstance(feature, Value) and "binary" not in feature.dtype
        )

    features = table.features
    return [name for name in features if name != IMAGE_COLUMN and is_plain(features[name])]


def _num_bytes(column: "Dataset") -> list[int]:
    """Count the encoded bytes of each row's image, without reading them."""
    import pyarrow.compute as pc

    # Arrow knows the lengths from its offsets.
    lengths = pc.binary_length(pc.struct_field(column.data.column(IMAGE_COLUMN), "bytes"))
    return [length or 0 for length in lengths.to_pylist()]


def _image_file(value: dict[str, Any] | None, root: Path) -> str | None:
    name = value.get("path") if value else None
    if not name or not is_unicode(name) or not is_inside(root / name, root):
        return None
    path = root / name
    return str(path) if path.is_file() else None
