"""Captioned images from any of five kinds of source, as one indexable object.

1. A folder with ``metadata.jsonl``, or ``.csv``: a row per image with ``file_name``, captions and
the like; also one such file in each sub-folder.
2. A folder with ``x.txt`` beside each ``x.jpg``, at any depth, one caption per line.
3. A WebDataset tar, or a folder of tars, as img2dataset writes them.
4. A parquet file, or a folder of them, with a column of encoded images.
5. The name of a data set on the Hugging Face Hub, ``user/name``.
"""

import dataclasses
import os
import re
from pathlib import Path

from dalle_mini_impl.data.readers.captions import (
    CAPTION_COLUMNS,
    DEFAULT_OPTIONS,
    ReadOptions,
    caption_of_path,
)
from dalle_mini_impl.data.readers.folder import TEXT_SUFFIXES, read_image_folder
from dalle_mini_impl.data.readers.metadata import (
    METADATA_NAME,
    METADATA_NAMES,
    find_metadata,
    read_metadata,
)
from dalle_mini_impl.data.readers.parquet import IMAGE_COLUMNS, read_hub, read_parquet
from dalle_mini_impl.data.readers.paths import Places, check_file, files_below, places_of
from dalle_mini_impl.data.readers.records import (
    IMAGE_SUFFIXES,
    Pair,
    Pairs,
    SkippedRecord,
    printable,
)
from dalle_mini_impl.data.readers.remedies import remedy_for
from dalle_mini_impl.data.readers.split_names import splits_of_files, splits_of_images
from dalle_mini_impl.data.readers.webdataset import read_tar
from dalle_mini_impl.data.splits import choose_split, split_names
from dalle_mini_impl.errors import UserError

__all__ = [
    "CAPTION_COLUMNS",
    "DEFAULT_OPTIONS",
    "Pair",
    "Pairs",
    "ReadOptions",
    "SkippedRecord",
    "is_hub_name",
    "open_all_splits",
    "open_pairs",
]

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def open_pairs(
    source: str, *, split: str | None = None, options: ReadOptions = DEFAULT_OPTIONS
) -> Pairs:
    """Open one split of a source of captioned images, or all of it, whatever its kind.

    Splits are those the source names: a ``split`` field in the metadata, JSON members or columns,
    the splits of a table, or the names of folders, tars and parquet files; see ``split_names``.
    Where it names none, 5 % are held out as "val"; see ``splits``.

    Raises:
        UserError: Nothing there, no captioned images, a broken metadata line, no such split.
    """
    pairs = _list_source(source, options)
    return dataclasses.replace(pairs, listed=choose_split(source, pairs.listed, split))


def open_all_splits(
    source: str, *, options: ReadOptions = DEFAULT_OPTIONS
) -> tuple[Pairs, list[str]]:
    """Open everything in a source, and name the split of each image; see ``open_pairs``.

    Raises:
        UserError: As ``open_pairs``.
    """
    pairs = _list_source(source, options)
    return pairs, split_names(pairs.listed)


def _list_source(source: str, options: ReadOptions) -> Pairs:
    path = Path(os.path.expanduser(source))
    pairs = _choose_reader(source, path, options)
    num_images = len(pairs.listed)
    if options.needs_captions:
        pairs.require_captions()
    if not pairs.listed:
        raise UserError(_nothing_found(source, path, pairs, num_images))
    pairs.num_records = len(pairs.listed) + len(pairs.skipped)
    pairs.fit = options.fit
    return pairs


def _nothing_found(source: str, path: Path, pairs: Pairs, num_images: int) -> str:
    # Reasons of the first records: an empty list alone would leave the user guessing.
    first = "; ".join(f"{record.path}: {record.reason}" for record in pairs.skipped[:3])
    remedy = remedy_for(os.listdir(path), source) if path.is_dir() else ""
    if not remedy and num_images:
        remedy = (
            f"{num_images} images have no caption: data.captions_from takes captions from the "
            "names of files (file_name) or folders (folder_name), or one for all (text:a red cup); "
            "train_vqvae.py needs none"
        )
    return (
        f"no captioned images found in {source}{f' ({first})' if first else ''}, expected "
        f"one of: a folder with {METADATA_NAME} (file_name, text), a folder with x.txt beside "
        "each x.jpg, WebDataset tars with key.jpg and key.txt, parquet files with columns "
        f"{IMAGE_COLUMNS[0]} and text, a Hub data set user/name{f'; {remedy}' if remedy else ''}"
    )


def _choose_reader(source: str, path: Path, options: ReadOptions) -> Pairs:
    if not source.strip():
        raise UserError(f"source is {source!r}, expected a folder, a file or a Hub name")
    suffix = path.suffix.lower()
    # The tests of os.path, unlike those of Path, never raise: a source may be any text.
    if os.path.isdir(path):
        return _read_folder(path, options)
    if os.path.isfile(path) and suffix == ".tar":
        return _with_captions(read_tar(path, options), options)
    if os.path.isfile(path) and suffix == ".parquet":
        places = places_of(path.resolve().parent)
        return _with_captions(read_parquet([path], [None], places, options), options)
    if os.path.exists(path):
        is_metadata = path.name in METADATA_NAMES
        remedy = "give the folder that it lies in" if is_metadata else remedy_for([path.name])
        ending = f"; {remedy}" if remedy else ""
        raise UserError(f"{source} is no folder, .tar or .parquet file{ending}")
    # "data/x.tar" is a missing file, not a data set of that name.
    is_file_name = suffix in (".tar", ".parquet", ".jsonl")
    if is_hub_name(source) and not is_file_name:
        return _with_captions(read_hub(source, options), options)
    raise UserError(f"no folder or file {printable(source)[:1000]}")


def is_hub_name(source: str) -> bool:
    """Tell a name on the Hugging Face Hub, owner/name, from a mistyped path.

    It is none if the folder above is there.
    """
    parent = os.path.dirname(os.path.expanduser(source))
    return _HUB_NAME.fullmatch(source) is not None and not os.path.exists(parent)


def _read_folder(folder: Path, options: ReadOptions) -> Pairs:
    """Read the form in which a folder holds captioned images; the most explicit one wins."""
    root, places = folder.resolve(), places_of(folder)
    # 1. metadata: then nothing else is read
    metadata = find_metadata(root)
    if metadata is not None:
        pairs = _with_captions(read_metadata(metadata, places, options), options)
        _note_unnamed(pairs, root, places, f"images that {metadata.name} does not name")
        return _in_split_folders(pairs, options)
    left_out = Pairs()
    folders = list(files_below(root, places, left_out))
    tars, tables = (
        _files_with_suffix(root, folders, places, suffix, left_out)
        for suffix in (".tar", ".parquet")
    )
    # 2. tars: those beside images count, those in sub-folders only if no image has a caption
    if any(tar.parent == root for tar in tars):
        return _read_tars(root, tars, left_out, options)
    images = _with_captions(read_image_folder(folders, places, options), options)
    images.extend(left_out)
    has_captions = any(pair.captions for pair in images)
    if tars and not has_captions:
        return _read_tars(root, tars, left_out, options)
    for tar in tars:
        images.note(tar.relative_to(root).as_posix(), "tars, as images with captions are there")
    # 3. img2dataset leaves parquet files of statistics beside its images, so images go first.
    if tables and not has_captions:
        try:
            return _read_tables(root, tables, places, left_out, options)
        except UserError:
            if options.needs_captions or not images.listed:
                raise
    # 4. image files with texts, or without for those who need none
    return _in_split_folders(images, options)


def _files_with_suffix(
    root: Path,
    folders: list[tuple[Path, list[str]]],
    places: Places,
    suffix: str,
    left_out: Pairs,
) -> list[Path]:
    """List the files of one kind at any depth, by path; what leads out is skipped."""
    found = []
    for parent, names in folders:
        for name in names:
            path = parent / name
            if path.suffix.lower() != suffix or name in METADATA_NAMES:
                continue
            try:
                check_file(path, places)
            except (OSError, ValueError) as error:
                if path.is_symlink():
                    left_out.skip(path.relative_to(root).as_posix(), str(error))
            else:
                found.append(path)
    return sorted(found)


def _note_unnamed(pairs: Pairs, root: Path, places: Places, reason: str) -> None:
    named = {printable(pair.path) for pair in pairs} | {record.path for record in pairs.skipped}
    for parent, names in files_below(root, places, Pairs()):
        for name in names:
            key = (parent / name).relative_to(root).as_posix()
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and printable(key) not in named:
                pairs.note(key, reason)


def _read_tars(root: Path, tars: list[Path], left_out: Pairs, options: ReadOptions) -> Pairs:
    splits = splits_of_files([tar.relative_to(root).as_posix() for tar in tars])
    pairs = Pairs()
    for tar, split in zip(tars, splits, strict=True):
        part = read_tar(tar, options, name=tar.relative_to(root).as_posix())
        # What a record says of itself counts more than the name of its tar.
        part.listed = [dataclasses.replace(pair, split=pair.split or split) for pair in part.listed]
        pairs.extend(part)
    pairs.extend(left_out)
    return _with_captions(pairs, options)


def _read_tables(
    root: Path, tables: list[Path], places: Places, left_out: Pairs, options: ReadOptions
) -> Pairs:
    splits = splits_of_files([table.relative_to(root).as_posix() for table in tables])
    pairs = read_parquet(tables, splits, places, options)
    pairs.extend(left_out)
    return _with_captions(pairs, options)


def _with_captions(pairs: Pairs, options: ReadOptions) -> Pairs:
    """Replace the captions of all images, where the options ask for others than the source's."""
    how = options.captions_from
    if how is None:
        return pairs
    if pairs.table is not None and how in ("file_name", "folder_name"):
        raise UserError(
            f"data.captions_from: got {how}, expected null or text:... for a table, whose rows "
            "are no files"
        )
    listed, pairs.listed = pairs.listed, []
    pairs.notes = [note for note in pairs.notes if not note.path.endswith(TEXT_SUFFIXES)]
    for pair in listed:
        caption = caption_of_path(pair.path, how)
        reason = f"no caption: its {how.replace('_', ' ')} holds no words"
        pairs.add(dataclasses.replace(pair, captions=(caption,) if caption else ()), reason)
    return pairs


def _in_split_folders(pairs: Pairs, options: ReadOptions) -> Pairs:
    """Put images in the splits that their folders name, where they name none themselves."""
    listed = [pair for pair in pairs if pair.captions] if options.needs_captions else pairs.listed
    if any(pair.split for pair in listed):
        return pairs
    # "test tube/001.jpg" with captions from folders is a thing, "Test/001.jpg" a split.
    whole = options.captions_from == "folder_name"
    splits = splits_of_images([pair.path for pair in listed], whole=whole)
    found = sorted({split for split in splits if split})
    if not found:
        return pairs
    named = {pair.path: split for pair, split in zip(listed, splits, strict=True)}
    kept = []
    for pair in pairs:
        split = named.get(pair.path)
        if split is None and pair.path in named:
            pairs.skip(pair.path, f"outside of the folders of splits ({', '.join(found)})")
        else:
            kept.append(dataclasses.replace(pair, split=split if len(found) > 1 else None))
    pairs.listed = kept
    return pairs
