"""Parquet files and Hub data sets, through Hugging Face ``datasets``; images stay encoded bytes."""

import glob
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle_mini_impl.data.readers.captions import (
    ReadOptions,
    collect_captions,
    no_caption_reason,
)
from dalle_mini_impl.data.readers.paths import Places, is_inside, is_unicode
from dalle_mini_impl.data.readers.records import (
    MAX_IMAGE_BYTES,
    Pair,
    Pairs,
    other_fields,
    split_field,
)
from dalle_mini_impl.data.readers.split_names import TRAIN
from dalle_mini_impl.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

# Encoded images: bytes, or a struct of bytes and path. img2dataset names the column by its format.
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")

_HUB_SECONDS = 10
# Images are compressed already. What unpacks to much more was made to fill a disk.
_MAX_EXPANSION = 100
_HARMLESS_BYTES = 2**30


def read_parquet(
    files: Sequence[Path], splits: Sequence[str | None], places: Places, options: ReadOptions
) -> Pairs:
    """List the rows of parquet files, each of which is one split or, at None, of no split.

    Files that rows name must lie in the places. Rows without image are skipped.

    Raises:
        UserError: Not readable as parquet, or no such columns.
    """
    from datasets import config, load_dataset

    groups: dict[str, list[str]] = defaultdict(list)
    for file, split in zip(files, splits, strict=True):
        check_expansion(file)
        groups[split or TRAIN].append(glob.escape(str(file)))
    source = str(files[0] if len(files) == 1 else files[0].parent)
    try:
        tables = load_dataset("parquet", data_files=dict(groups))
    except Exception as error:  # datasets and pyarrow raise many types for a damaged file
        reason = _last_cause(error)
        if isinstance(error, OSError) and error.errno is not None:
            reason += f"; its cache is {config.HF_DATASETS_CACHE}, HF_HOME names another folder"
        raise UserError(f"cannot read {source} as parquet: {reason}") from error
    return _list_tables(tables, source=source, places=places, options=options)


def check_expansion(file: Path) -> None:
    """Refuse a parquet file that unpacks to a multiple of its size."""
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


def read_hub(name: str, options: ReadOptions) -> Pairs:
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
    return _list_tables(tables, source=name, places=(root,), options=options)


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
    tables: "Mapping[str, Dataset]", *, source: str, places: Places, options: ReadOptions
) -> Pairs:
    """List the rows of all tables, one table per split; files of images must lie in the places."""
    from datasets import concatenate_datasets

    pairs = Pairs()
    images: list[Dataset] = []
    for split, table in tables.items():
        name = _check_columns(table, source, options)
        column = _encoded_images(table, name, source)
        num_bytes = _num_bytes(column)
        # Rows are counted through all tables, as concatenate_datasets will number them.
        first_row = sum(len(each) for each in images)
        columns = _plain_columns(table, name)
        # A table without columns has no rows.
        others = table.select_columns(columns) if columns else ({} for _ in range(len(table)))
        for row, fields in enumerate(others):
            path = f"{split} row {row}" if len(tables) > 1 else f"row {row}"
            # A row holds the bytes, or the path of a file inside the root, or nothing that is used.
            file = "" if num_bytes[row] else _image_file(column[row][IMAGE_COLUMNS[0]], places)
            if file is None:
                # img2dataset says how the download ended.
                status = fields.get("status")
                ending = f" (status {status})" if status else ""
                pairs.skip(path, f"no image in column {name}{ending}")
                continue
            if num_bytes[row] > MAX_IMAGE_BYTES:
                pairs.skip(path, f"{num_bytes[row]} bytes, expected at most {MAX_IMAGE_BYTES}")
                continue
            # Dates and decimals become text: a run keeps attributes as JSON.
            attributes = other_fields(fields, options.caption_columns)
            pair = Pair(
                path=path,
                captions=collect_captions(fields, options.caption_columns),
                attributes=json.loads(json.dumps(attributes, default=str)),
                split=split_field(fields) if len(tables) == 1 else split,
                file=file,
                offset=0 if file else first_row + row,
            )
            pairs.add(pair, no_caption_reason(fields, options.caption_columns))
        images.append(column)
    pairs.table = concatenate_datasets(images) if images else None
    return pairs


def _check_columns(table: "Dataset", source: str, options: ReadOptions) -> str:
    """Return the name of the column of images."""
    names = table.column_names
    choices = IMAGE_COLUMNS if options.image_column is None else (options.image_column,)
    image = next((each for each in choices if each in names), None)
    if image is None:
        message = f"{source} has no column {choices[0]!r} for images, but {names}; "
        url = next((each for each in names if each.lower().endswith("url")), None)
        if url is None or options.image_column is not None:
            raise UserError(message + "data.image_column names another one")
        caption = next((each for each in names if each.lower() in ("text", "caption")), "TEXT")
        raise UserError(
            f"{message}{url} holds addresses, expected images; img2dataset fetches them: "
            f"img2dataset --url_list {source} --input_format parquet --url_col {url} "
            f"--caption_col {caption} --output_format webdataset --output_folder images"
        )
    reads_captions = options.needs_captions and options.captions_from is None
    if reads_captions and not set(options.caption_columns) & set(names):
        expected = ", ".join(options.caption_columns)
        raise UserError(
            f"{source} has none of the columns {expected} for captions, but {names}; "
            "data.caption_columns names others"
        )
    return image


def _encoded_images(table: "Dataset", name: str, source: str) -> "Dataset":
    """Return the column of images alone, under one name for all tables, not decoded."""
    from datasets import Image

    column = table.select_columns([name])
    try:
        column = column.cast_column(name, Image(decode=False))
    except Exception as error:  # pyarrow has a type for each way in which it cannot be done
        raise UserError(
            f"{source}: column {name!r} holds {column.features[name]}, "
            "expected encoded images (bytes)"
        ) from error
    return column if name == IMAGE_COLUMNS[0] else column.rename_column(name, IMAGE_COLUMNS[0])


def _plain_columns(table: "Dataset", image_column: str) -> list[str]:
    """List the columns of numbers, text, or lists of them: nothing that a library would decode."""
    from datasets import ClassLabel, LargeList, List, Value

    def is_plain(feature: Any) -> bool:
        if isinstance(feature, List | LargeList):
            return is_plain(feature.feature)
        return isinstance(feature, ClassLabel) or (
            isinstance(feature, Value) and "binary" not in feature.dtype
        )

    features = table.features
    return [name for name in features if name != image_column and is_plain(features[name])]


def _num_bytes(column: "Dataset") -> list[int]:
    """Count the encoded bytes of each row's image, without reading them."""
    import pyarrow.compute as pc

    # Arrow knows the lengths from its offsets.
    lengths = pc.binary_length(pc.struct_field(column.data.column(IMAGE_COLUMNS[0]), "bytes"))
    return [length or 0 for length in lengths.to_pylist()]


def _image_file(value: dict[str, Any] | None, places: Places) -> str | None:
    name = value.get("path") if value else None
    if not name or not is_unicode(name) or not is_inside(places[0] / name, places):
        return None
    path = places[0] / name
    return str(path) if path.is_file() else None
