"""Splits by the names of folders and of files with many images: the words of ``datasets``.

A word is a run of letters, in any case: "val2017", "coco_val" and "Test" hold one, "trains" none.
"""

import itertools
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from dalle_mini_impl.errors import UserError

TRAIN, VALIDATION, TEST = "train", "validation", "test"
_SPLIT_OF_WORD = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev"), VALIDATION),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), TEST),
}
_LETTERS = re.compile(r"[^\W\d_]+")


def split_in_name(name: str, *, whole: bool = False) -> str | None:
    """Return the split that a name holds a word of; with ``whole``, no other word than that."""
    words = [word.lower() for word in _LETTERS.findall(name)]
    found = {_SPLIT_OF_WORD[word] for word in words if word in _SPLIT_OF_WORD}
    # "train_val" is neither.
    if len(found) != 1 or (whole and len(words) > 1):
        return None
    return found.pop()


def splits_of_files(paths: Sequence[str]) -> list[str | None]:
    """Name the split of each tar or parquet file, by its top folder or its own name.

    All are None where the names tell no two splits apart.

    Raises:
        UserError: Some names hold a split, and others do not.
    """
    splits = [
        (top and split_in_name(top)) or split_in_name(PurePosixPath(path).stem)
        for path, top in zip(paths, _top_folders(paths), strict=True)
    ]
    if None in splits and any(splits):
        unnamed = paths[splits.index(None)]
        named = next(path for path, split in zip(paths, splits, strict=True) if split)
        raise UserError(
            f"file names: {named} names a split, but {unnamed} does not; expected a word like "
            "train, val or test in all of them or in none; rename or move files"
        )
    return splits if len(set(splits)) > 1 else [None] * len(paths)


def splits_of_images(paths: Sequence[str], *, whole: bool = False) -> list[str | None]:
    """Name the split of each image by its top folder, the first one that not all images share.

    All are None where no name is a split's, or all are one split's. Otherwise None stands for an
    image outside of the split folders.

    Raises:
        UserError: One split has a folder, and there are folders that name none.
    """
    tops = _top_folders(paths)
    splits = [top and split_in_name(top, whole=whole) for top in tops]
    found = {split for split in splits if split}
    others = sorted({top for top, split in zip(tops, splits, strict=True) if top and not split})
    if len(found) == 1 and others:
        folder = next(top for top, split in zip(tops, splits, strict=True) if split)
        raise UserError(
            f"folder names: {folder} names a split, but {', '.join(others[:5])} "
            f"{'does' if len(others) == 1 else 'do'} not; expected a word like train, val or test "
            "in the names of all folders or of none; rename or move folders"
        )
    return splits if found and (len(found) > 1 or None in splits) else [None] * len(paths)


def _top_folders(paths: Sequence[str]) -> list[str | None]:
    """Return the first folder of each path that they do not all share; None for none."""
    folders = [PurePosixPath(path).parent.parts for path in paths]
    # Those of the first and the last one in order are those of all.
    ends = zip(min(folders, default=()), max(folders, default=()), strict=False)
    depth = sum(1 for _ in itertools.takewhile(lambda names: names[0] == names[1], ends))
    # All in "train": what lies deeper are things, such as "test tube".
    if any(split_in_name(name) for parts in folders[:1] for name in parts[:depth]):
        return [None] * len(paths)
    return [parts[depth] if len(parts) > depth else None for parts in folders]
