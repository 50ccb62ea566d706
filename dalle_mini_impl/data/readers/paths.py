"""Files of a source: what lies in its folders, and which links may be followed."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from dalle_mini_impl.data.readers.records import Pairs

Places = tuple[Path, ...]  # resolved folders in which a source's files may lie


def places_of(root: Path) -> Places:
    """List the folders that links of a source may lead into: itself, and the store it belongs to.

    That is ``blobs`` of its own repository in the Hugging Face cache, ``.git/annex/objects`` of its
    own git repository, and ``.dvc/cache`` of its own DVC repository.
    """
    root = root.resolve()
    stores = []
    for folder in (root, *root.parents):
        if folder.name == "snapshots" and folder.parent.name.startswith(("datasets--", "models--")):
            stores.append(folder.parent / "blobs")
    for marker, store in ((".git", "annex/objects"), (".dvc", "cache")):
        for folder in (root, *root.parents):
            if (folder / marker).is_dir():
                stores.append(folder / marker / store)
                break  # of the innermost repository alone
    # Not resolved, on purpose: a store that is itself a link, as a stranger may bring it, is no
    # place, as targets are compared once all links are followed.
    return (root, *stores)


def is_inside(path: Path, places: Places) -> bool:
    """Tell whether a path lies in one of the places, once symbolic links are followed."""
    try:
        target = Path(os.path.realpath(path))
    except (OSError, ValueError):  # a link loop; a NUL in the name
        return False
    return any(target.is_relative_to(place) for place in places)


def leads_outside(name: str) -> bool:
    """Tell whether a relative file name, as written, could leave its folder.

    True for absolute names (Windows drives too) and for any ``..`` part, with / or backslashes.
    """
    # Windows rules on every system: the data set may travel.
    windows = PureWindowsPath(name)
    absolute = PurePosixPath(name).is_absolute() or bool(windows.drive or windows.root)
    return absolute or ".." in windows.parts


def check_file(path: Path, places: Places) -> None:
    """Refuse what is no regular file of the source; ``ValueError`` says why."""
    if not is_unicode(str(path)):
        raise ValueError(f"its path is not valid Unicode{encoding_remedy()}")
    # Links within the folder are fine; a stranger's data set must not show files of ours.
    if path.is_symlink():
        if not is_inside(path, places):
            raise ValueError(f"{path.name} is a link that leads out of the folder")
        if not path.exists():
            raise ValueError(
                f"{path.name} is a link to a file that is not there; git-annex and DVC fetch it "
                "with `git annex get` and `dvc pull`"
            )
    if not path.is_file():
        raise ValueError(f"no file {path.name} beside it")


def files_below(folder: Path, places: Places, pairs: Pairs) -> Iterator[tuple[Path, list[str]]]:
    """Walk a folder, each before its sub-folders, and yield it with the sorted names of its files.

    Hidden files and folders (names with a leading dot) and folders that cannot be read are passed
    over. Linked folders are followed within the places; others are skipped in ``pairs``. Each
    folder is walked once, whatever number of names it has.
    """
    # Unlike ``os.walk`` and ``Path.rglob`` no recursion, so that no depth of folders stops it.
    remaining, seen = [folder], set()
    while remaining:
        parent = remaining.pop()
        try:
            stat = parent.stat()
            with os.scandir(parent) as entries:
                visible = sorted(
                    (entry for entry in entries if not entry.name.startswith(".")),
                    key=lambda entry: entry.name,
                )
                folders = [entry for entry in visible if _is_folder(entry)]
        except OSError:
            continue
        if (stat.st_dev, stat.st_ino) in seen:
            key = parent.relative_to(folder).as_posix()
            pairs.note(key, "linked folders that are read already under another name")
            continue
        seen.add((stat.st_dev, stat.st_ino))
        links, own = [], []
        for entry in folders:
            path = parent / entry.name
            if not entry.is_symlink():
                own.append(path)
            elif is_inside(path, places):
                links.append(path)
            else:
                key = path.relative_to(folder).as_posix()
                pairs.skip(key, f"{entry.name} is a link that leads out of the folder")
        # The last one is taken next: links first, whose names were given on purpose, then folders
        # in sorted order.
        remaining += [*reversed(own), *reversed(links)]
        names_of_folders = {entry.name for entry in folders}
        yield parent, [entry.name for entry in visible if entry.name not in names_of_folders]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def is_unicode(text: str) -> bool:
    """Tell whether a string can be written as UTF-8 (half surrogate pairs cannot)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def encoding_remedy() -> str:
    """Say what to change where the system's encoding cannot hold every file name."""
    encoding = sys.getfilesystemencoding()
    if encoding.lower() == "utf-8":
        return ""
    return f" in this system's encoding, {encoding}; set PYTHONUTF8=1"
