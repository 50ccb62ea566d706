"""What to do with files that come close to a form that is read."""

from collections.abc import Sequence
from pathlib import Path

from dalle_mini_impl.data.readers.metadata import JSON_REMEDY, METADATA_NAME, METADATA_NAMES
from dalle_mini_impl.data.readers.records import IMAGE_SUFFIXES, printable

_ARCHIVES = (".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar")


def remedy_for(names: Sequence[str], folder: str = "FOLDER") -> str:
    """Name the files of a folder that hold images or captions in another form, and the way out."""
    stems_of_images = {Path(name).stem for name in names if _suffix(name) in IMAGE_SUFFIXES}
    remedies: dict[str, str] = {}
    for name in sorted(names):
        remedy = _remedy(name, folder)
        # "cat.json" beside "cat.jpg" says something of one image.
        if remedy and Path(name).stem not in stems_of_images:
            remedies.setdefault(_suffix(name), printable(f"{name}: {remedy}"))
    return "; ".join(remedies.values())


def _remedy(name: str, folder: str) -> str:
    is_list = "if it names images and captions,"
    remedy = ""
    if name.lower().endswith(_ARCHIVES):
        unpack = f"python -m zipfile -e {name} {folder}" if name.lower().endswith(".zip") else ""
        remedy = f"unpack it first{f': {unpack}' if unpack else ''}"
    elif _suffix(name) == ".jsonl":
        remedy = f"{is_list} rename it to {METADATA_NAME}"
    elif _suffix(name) == ".json":
        remedy = f"{is_list} {JSON_REMEDY.replace('OLD', name)}"
    elif _suffix(name) in (".csv", ".tsv"):
        remedy = f"{is_list} rename it to metadata.csv (columns file_name,text)"
    elif _suffix(name) == ".arrow":
        load = f'datasets.load_from_disk("{folder}").to_parquet("images.parquet")'
        remedy = f"write parquet: python -c 'import datasets; {load}'"
    return "" if name in METADATA_NAMES else remedy


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()
