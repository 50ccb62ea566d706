"""Folders of image files, with captions in metadata files or in a text file beside each."""

from collections.abc import Iterable
from pathlib import Path

from dalle_mini_impl.data.readers.captions import ReadOptions, lines_of_captions
from dalle_mini_impl.data.readers.metadata import find_metadata, read_metadata
from dalle_mini_impl.data.readers.paths import Places, check_file
from dalle_mini_impl.data.readers.records import (
    IMAGE_SUFFIXES,
    MAX_TEXT_BYTES,
    OTHER_IMAGE_SUFFIXES,
    Pair,
    Pairs,
    other_format_reason,
)

TEXT_SUFFIXES = (".txt", ".caption")


def read_image_folder(
    folders: Iterable[tuple[Path, list[str]]], places: Places, options: ReadOptions
) -> Pairs:
    """List the images of folders, which come each before its sub-folders.

    The first of the places is the source. A metadata file speaks for its folder and all below it.
    Elsewhere an image has ``x.txt`` beside ``x.jpg``, one caption per line. Keys are relative
    paths, so equal names in two sub-folders stay apart.
    """
    pairs = Pairs()
    spoken_for: Path | None = None
    for parent, names in folders:
        # Depth first: all folders below one follow it at once.
        if spoken_for is not None and parent.is_relative_to(spoken_for):
            continue
        metadata = find_metadata(parent)
        if metadata is None:
            _list_one_folder(parent, names, places, pairs)
        else:
            spoken_for = parent
            pairs.extend(read_metadata(metadata, places, options))
    return pairs


def _list_one_folder(parent: Path, names: list[str], places: Places, pairs: Pairs) -> None:
    images = [name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    # "a.JPG" belongs to "a.TXT", but not to "A.txt": suffixes in any case, stems exactly.
    texts: dict[str, list[str]] = {}
    for suffix in TEXT_SUFFIXES:
        for name in names:
            if Path(name).suffix.lower() == suffix:
                texts.setdefault(Path(name).stem, []).append(name)
    for name in images:
        path = parent / name
        key = path.relative_to(places[0]).as_posix()
        try:
            check_file(path, places)
        except (OSError, ValueError) as error:
            pairs.skip(key, str(error))
            continue
        # Both "cat.txt" and "cat.png.txt" are in use; the first name is for a message.
        own_texts = [*texts.get(path.stem, []), *texts.get(name, [])] or [f"{path.stem}.txt"]
        captions: dict[str, None] = {}
        reason = ""
        for text_name in own_texts:
            try:
                captions |= dict.fromkeys(_read_caption_file(parent / text_name, places))
            except (OSError, ValueError) as error:
                reason = reason or str(error)
        pairs.add(Pair(key, tuple(captions), file=str(path)), reason)
    _note_the_rest(parent, names, images, texts, places, pairs)


def _note_the_rest(
    parent: Path,
    names: list[str],
    images: list[str],
    texts: dict[str, list[str]],
    places: Places,
    pairs: Pairs,
) -> None:
    """Say what is left out: texts without image, and images in formats that are not read."""
    folder = parent.relative_to(places[0])
    used = {Path(name).stem for name in images} | set(images)
    others = [name for name in names if Path(name).suffix.lower() in OTHER_IMAGE_SUFFIXES]
    with_text = set()
    for stem, found in texts.items():
        other = next((name for name in others if stem in (name, Path(name).stem)), None)
        for name in found if stem not in used else []:
            if other is None:
                # README.txt, classes.txt: no images that are missing.
                reason = "text files without an image of the same name beside them"
                pairs.note((folder / name).as_posix(), reason)
            else:
                with_text.add(other)
                pairs.skip((folder / name).as_posix(), other_format_reason(other))
    for name in others:
        if name not in with_text:
            pairs.note((folder / name).as_posix(), "images in a format that is not read")


def _read_caption_file(path: Path, places: Places) -> tuple[str, ...]:
    check_file(path, places)
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise ValueError(f"{path.name} is longer than {MAX_TEXT_BYTES} bytes")
    data = path.read_bytes()
    captions = lines_of_captions(data)
    if not captions:
        text = " ".join(data.decode("utf-8-sig").split())
        raise ValueError(f"no caption: {path.name} is {repr(text[:60]) if text else 'empty'}")
    return captions
