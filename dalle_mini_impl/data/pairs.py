"""Captioned images from any of five kinds of source, as one indexable object.

1. A folder with `metadata.jsonl`: a JSON object per line with `file_name`, captions and the like.
2. A folder with `x.txt` beside each `x.jpg`, at any depth, one caption per line.
3. A WebDataset tar, or a folder of tars, as img2dataset writes them.
4. A parquet file, or a folder of them, with a column of encoded images.
5. The name of a data set on the Hugging Face Hub, `user/name`.

Only paths and captions are held, in an Arrow table of Hugging Face `datasets`. The images stay
where they are and are decoded one at a time by `images.decode_image`.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle_mini_impl.data.images import BadImageError
from dalle_mini_impl.data.readers.folder import (
    METADATA_NAME,
    read_metadata_folder,
    read_sidecar_folder,
)
from dalle_mini_impl.data.readers.parquet import parquet_files, read_hub, read_parquet
from dalle_mini_impl.data.readers.records import (
    MAX_IMAGE_BYTES,
    WHOLE_FILE,
    Listing,
    RawPair,
    SkippedRecord,
    printable,
)
from dalle_mini_impl.data.readers.webdataset import read_tar
from dalle_mini_impl.data.splits import choose_split, split_names
from dalle_mini_impl.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset


TEXT_COLUMNS = ("text", "text_ko", "caption", "texts", "texts_ko")  # main captions first
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class Pair:
    """One image's captions; the image itself is read through `Pairs`."""

    path: str
    """Key shown in messages: path within the folder, tar!member, or row."""
    captions: tuple[str, ...]
    """At least one caption, none empty: all paraphrases and languages."""
    attributes: dict[str, Any]
    """Whatever else the source says about the image."""


class Pairs:
    """An indexable set of captioned images; make one with `open_pairs`."""

    def __init__(
        self,
        listed: Sequence[RawPair],
        skipped: Sequence[SkippedRecord],
        images: "Dataset | None",
        *,
        num_records: int,
    ) -> None:
        """Puts the records into an Arrow table.

        Args:
            listed: What a reader found.
            skipped: What it left out.
            images: Rows that hold the encoded images, for sources that are tables.
            num_records: Records of the whole source, those left out included.
        """
        from datasets import Dataset, Features, List, Value

        text, number = Value("string"), Value("int64")
        columns = {
            "path": (text, [pair.path for pair in listed]),
            "captions": (List(text), [list(pair.captions) for pair in listed]),
            "attributes": (text, [json.dumps(pair.attributes, default=str) for pair in listed]),
            "file": (text, [pair.file for pair in listed]),
            "offset": (number, [pair.offset for pair in listed]),
            "size": (number, [pair.size for pair in listed]),
        }
        self._records = Dataset.from_dict(
            {name: values for name, (_, values) in columns.items()},
            features=Features({name: feature for name, (feature, _) in columns.items()}),
        )
        self._images = images
        self.skipped = tuple(skipped)
        self.num_records = num_records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Pair:
        return self._pair(self._record(index))

    def __iter__(self) -> Iterator[Pair]:
        return map(self._pair, self._records)

    def read_image(self, index: int) -> bytes:
        """Reads the encoded bytes of one image.

        Args:
            index: Which pair.

        Returns:
            The image file as it is.

        Raises:
            BadImageError: The file is gone, unreadable or larger than 256 MiB.
        """
        record = self._record(index)
        if not record["file"]:
            assert self._images is not None
            [value] = self._images[record["offset"]].values()
            return bytes(value["bytes"])
        size = record["size"]
        expected = MAX_IMAGE_BYTES if size == WHOLE_FILE else size
        try:
            with open(record["file"], "rb") as file:
                if size == WHOLE_FILE and os.fstat(file.fileno()).st_size > MAX_IMAGE_BYTES:
                    raise BadImageError(record["path"], f"larger than {MAX_IMAGE_BYTES} bytes")
                file.seek(record["offset"])
                data = file.read(expected)
        except OSError as error:
            raise BadImageError(record["path"], f"cannot be read ({error.strerror})") from error
        if size != WHOLE_FILE and len(data) != size:
            raise BadImageError(record["path"], f"{len(data)} bytes left, expected {size}")
        return data

    def _record(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        return self._records[index]

    @staticmethod
    def _pair(record: dict[str, Any]) -> Pair:
        attributes = json.loads(record["attributes"])
        return Pair(record["path"], tuple(record["captions"]), attributes)


def open_pairs(
    source: str,
    *,
    split: str | None = None,
    text_columns: Sequence[str] = TEXT_COLUMNS,
    image_column: str = "image",
) -> Pairs:
    """Opens a source of captioned images, whatever its kind.

    Splits are those the source names: a `split` field in the metadata, JSON members or columns, or
    the splits of a table. Where it names none, 5 % are held out as "val"; see `splits`.

    Args:
        source: A folder, a .tar or .parquet file, or the name of a Hub data set (`user/name`).
        split: The split to open; None for everything.
        text_columns: Fields or columns that hold captions (strings or lists of strings).
        image_column: Column of the images, for parquet and the Hub.

    Returns:
        The pairs of that split. Records of the whole source that were left out are in `skipped`.

    Raises:
        UserError: Nothing there, no captioned images, a broken metadata line, no such split.
    """
    listing = _list_whole(source, text_columns, image_column)
    chosen = choose_split(source, listing.pairs, split)
    return _pairs_of(listing, chosen)


def open_all_splits(
    source: str, *, text_columns: Sequence[str] = TEXT_COLUMNS, image_column: str = "image"
) -> tuple[Pairs, list[str]]:
    """Opens everything in a source, whatever its split.

    Args:
        source: As for `open_pairs`.
        text_columns: As for `open_pairs`.
        image_column: As for `open_pairs`.

    Returns:
        All pairs, and the name of the split of each.

    Raises:
        UserError: As `open_pairs`.
    """
    listing = _list_whole(source, text_columns, image_column)
    return _pairs_of(listing, listing.pairs), split_names(listing.pairs)


def _pairs_of(listing: Listing, chosen: Sequence[RawPair]) -> Pairs:
    num_records = len(listing.pairs) + len(listing.skipped)
    return Pairs(chosen, listing.skipped, listing.images, num_records=num_records)


def _list_whole(source: str, text_columns: Sequence[str], image_column: str) -> Listing:
    listing = _list_source(source, text_columns, image_column)
    if not listing.pairs:
        first = "; ".join(f"{record.path}: {record.reason}" for record in listing.skipped[:3])
        raise UserError(
            f"no captioned images found in {source}{f' ({first})' if first else ''}, expected "
            f"one of: a folder with {METADATA_NAME} (file_name, text), a folder with x.txt beside "
            "each x.jpg, WebDataset tars with key.jpg and key.txt, parquet files with columns "
            f"{image_column} and text, a Hub data set user/name"
        )
    return listing


def _list_source(source: str, text_columns: Sequence[str], image_column: str) -> Listing:
    if not source.strip():
        raise UserError(f"source is {source!r}, expected a folder, a file or a Hub name")
    path = Path(os.path.expanduser(source))
    suffix = path.suffix.lower()
    # Those of os.path, unlike those of Path, never raise: a source may be any text.
    if os.path.isdir(path):
        return _list_folder(path, text_columns, image_column)
    if os.path.isfile(path) and suffix == ".tar":
        return read_tar(path, shown_name=path.name, text_columns=text_columns)
    if os.path.isfile(path) and suffix == ".parquet":
        return read_parquet(path, text_columns=text_columns, image_column=image_column)
    if os.path.exists(path):
        raise UserError(f"{source} is no folder, .tar or .parquet file")
    is_file_name = suffix in (".tar", ".parquet", ".jsonl")
    if is_hub_name(source) and not is_file_name:
        return read_hub(source, text_columns=text_columns, image_column=image_column)
    raise UserError(f"no folder or file {printable(source)[:1000]}")


def is_hub_name(source: str) -> bool:
    """Tell a name on the Hugging Face Hub, owner/name, from a mistyped path.

    Args:
        source: That nothing here is called.

    Returns:
        False if it is not of that form, or if the folder above is there.
    """
    parent = os.path.dirname(os.path.expanduser(source))
    return _HUB_NAME.fullmatch(source) is not None and not os.path.exists(parent)


def _list_folder(folder: Path, text_columns: Sequence[str], image_column: str) -> Listing:
    if (folder / METADATA_NAME).is_file():
        return read_metadata_folder(folder, text_columns)
    tars = sorted(path for path in folder.glob("*.tar") if path.is_file())
    if tars:
        listing = Listing()
        for tar in tars:
            part = read_tar(tar, shown_name=tar.name, text_columns=text_columns)
            listing.pairs += part.pairs
            listing.skipped += part.skipped
        return listing
    listing = read_sidecar_folder(folder)
    # img2dataset leaves parquet files of statistics beside its images, so images go first.
    if not listing.pairs and parquet_files(folder):
        return read_parquet(folder, text_columns=text_columns, image_column=image_column)
    return listing
