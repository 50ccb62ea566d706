"""Parquet files and Hub data sets, through Hugging Face `datasets`; images stay encoded bytes."""

import glob
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle_mini_impl.data.readers.records import (
    MAX_IMAGE_BYTES,
    Listing,
    RawPair,
    collect_captions,
    files_below,
    is_inside,
    is_unicode,
    no_caption_reason,
)
from dalle_mini_impl.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

# The Hub's habit: train-00000-of-00004.parquet, or test/0000.parquet.
_SPLIT_IN_NAME = re.compile(r"^(train|validation|val|dev|test)(?=$|[-_.])")

_HUB_SECONDS = 10
# Images are compressed already. What unpacks to much more was made to fill a disk.
_MAX_EXPANSION = 100
_HARMLESS_BYTES = 2**30


def read_parquet(path: Path, *, text_columns: Sequence[str], image_column: str) -> Listing:
    """Lists one parquet file, or all parquet files in a folder and below.

    A split is named by a file or first folder that begins with train, validation, val, dev, test.

    Args:
        path: The file or folder.
        text_columns: Columns that hold captions (strings or lists of strings).
        image_column: Column of encoded images (bytes, or a struct of bytes and path).

    Returns:
        Rows in the order of the files. Rows without image or caption are skipped.

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
    return _list_tables(
        tables, source=str(path), root=root, text_columns=text_columns, image_column=image_column
    )


def parquet_files(path: Path) -> list[Path]:
    """Finds the parquet files of a source.

    Args:
        path: A file, or a folder that is searched at any depth.

    Returns:
        The file itself, or the folder's regular files in the order of their paths.
    """
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
    limit = max(_HARMLESS_BYTES, _MAX_EXPANSION * packed)
    if unpacked > limit or num_rows > limit:
        raise UserError(
            f"{file}: {packed} bytes that unpack to {unpacked} in {num_rows} rows, expected at most "
            f"{limit} of both"
        )


def read_hub(name: str, *, text_columns: Sequence[str], image_column: str) -> Listing:
    """Lists a data set of the Hugging Face Hub, downloading it if need be.

    Args:
        name: `user/name`.
        text_columns: Columns that hold captions.
        image_column: Column of encoded images.

    Returns:
        Rows of all splits. Rows without image or caption are skipped.

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
    return _list_tables(
        tables, source=name, root=root, text_columns=text_columns, image_column=image_column
    )


def _check_hub_answers(taken: str) -> None:
    """Asks once, without naming the data set; `datasets` itself tries for a minute or more."""
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
    tables: "Mapping[str, Dataset]",
    *,
    source: str,
    root: Path,
    text_columns: Sequence[str],
    image_column: str,
) -> Listing:
    from datasets import Image, concatenate_datasets

    listing = Listing()
    images: list[Dataset] = []
    first_row = 0
    for split, table in tables.items():
        _check_columns(table, source, text_columns, image_column)
        column = table.select_columns([image_column])
        try:
            column = column.cast_column(image_column, Image(decode=False))
        except Exception as error:  # pyarrow has a type for each way in which it cannot be done
            raise UserError(
                f"{source}: column {image_column!r} holds {column.features[image_column]}, "
                "expected encoded images (bytes)"
            ) from error
        num_bytes = _num_bytes(column, image_column)
        plain = table.select_columns(_plain_columns(table, image_column))
        for row, fields in enumerate(plain):
            path = f"{split} row {row}" if len(tables) > 1 else f"row {row}"
            file = "" if num_bytes[row] else _image_file(column[row][image_column], root)
            captions = collect_captions(fields, text_columns)
            if file is None:
                listing.skip(path, f"no image in column {image_column}")
            elif num_bytes[row] > MAX_IMAGE_BYTES:
                listing.skip(path, f"{num_bytes[row]} bytes, expected at most {MAX_IMAGE_BYTES}")
            elif not captions:
                listing.skip(path, no_caption_reason(fields, text_columns))
            else:
                attributes = {key: fields[key] for key in fields if key not in text_columns}
                own_split = fields.get("split") if len(tables) == 1 else split
                listing.pairs.append(
                    RawPair(
                        path=path,
                        captions=captions,
                        attributes=attributes,
                        split=own_split if isinstance(own_split, str) else None,
                        file=file,
                        offset=0 if file else first_row + row,
                    )
                )
        images.append(column)
        first_row += len(table)
    listing.images = concatenate_datasets(images) if images else None
    return listing


def _check_columns(
    table: "Dataset", source: str, text_columns: Sequence[str], image_column: str
) -> None:
    names = table.column_names
    if image_column not in names:
        raise UserError(f"{source} has no column {image_column!r} for images, but {names}")
    if not set(text_columns) & set(names):
        expected = ", ".join(text_columns)
        raise UserError(f"{source} has none of the columns {expected} for captions, but {names}")


def _plain_columns(table: "Dataset", image_column: str) -> list[str]:
    """Columns that are numbers, text, or lists of them: nothing that a library would decode."""
    from datasets import ClassLabel, LargeList, List, Value

    def is_plain(feature: Any) -> bool:
        if isinstance(feature, List | LargeList):
            return is_plain(feature.feature)
        return isinstance(feature, ClassLabel) or (
            isinstance(feature, Value) and "binary" not in feature.dtype
        )

    features = table.features
    return [name for name in features if name != image_column and is_plain(features[name])]


def _num_bytes(column: "Dataset", image_column: str) -> list[int]:
    """Counts the encoded bytes of each row's image, without reading them."""
    import pyarrow.compute as pc

    lengths = pc.binary_length(pc.struct_field(column.data.column(image_column), "bytes"))
    return [length or 0 for length in lengths.to_pylist()]


def _image_file(value: dict[str, Any] | None, root: Path) -> str | None:
    name = value.get("path") if value else None
    if not name or not is_unicode(name) or not is_inside(root / name, root):
        return None
    path = root / name
    return str(path) if path.is_file() else None
