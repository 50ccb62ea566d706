"""Which images are for training and which for evaluation.

A source may name its splits; records without a name are then "train". In a source that names none,
a fixed 5 % become "val", chosen by a hash of each path. "val", "validation", "valid" and "dev" mean
the same, and so do the words for train and for test; see ``readers.split_names``.
"""

import hashlib
from collections.abc import Sequence

from dalle_mini_impl.data.readers.records import Pair
from dalle_mini_impl.data.readers.split_names import TRAIN, VALIDATION, split_in_name
from dalle_mini_impl.errors import UserError

HELD_OUT_FRACTION = 0.05
MIN_PAIRS_TO_HOLD_OUT = 10
MIN_HELD_OUT = 2
HELD_OUT = "val"


def choose_split(source: str, listed: Sequence[Pair], split: str | None) -> list[Pair]:
    """Choose the records of one split, in their order; all of them where ``split`` is None.

    Raises:
        UserError: There is no such split, or too little to hold any out.
    """
    if split is None:
        return list(listed)
    has_names = any(pair.split for pair in listed)
    meant = split_in_name(split, whole=True)
    if not has_names and meant not in (TRAIN, VALIDATION):
        raise UserError(
            f"{source} names no splits, so expected split 'train' or 'val', not {split!r}"
        )
    names = split_names(listed)
    same = {name for name in names if meant and split_in_name(name, whole=True) == meant}
    expected = {split, *same}
    chosen = [pair for pair, name in zip(listed, names, strict=True) if name in expected]
    if not chosen and has_names:
        known = ", ".join(sorted(set(names)))
        raise UserError(
            f"{source} has no split {split!r}, it has {known}; data.train_split and "
            "data.validation_split name others"
        )
    if not chosen:
        raise UserError(
            f"{source} names no splits and has {len(listed)} pairs; expected at least "
            f"{MIN_PAIRS_TO_HOLD_OUT} to hold some of them out as {split!r}"
        )
    return chosen


def split_names(listed: Sequence[Pair]) -> list[str]:
    """Name the split of each record, as ``choose_split`` sees it."""
    # Where a source names any split, records without one are for training.
    if any(pair.split for pair in listed):
        return [pair.split or TRAIN for pair in listed]
    held_out = held_out_indices([pair.path for pair in listed])
    return [HELD_OUT if index in held_out else TRAIN for index in range(len(listed))]


def held_out_indices(paths: Sequence[str]) -> set[int]:
    """Choose the held-out pairs by a hash of each path, not by number or order.

    Below 10 pairs nothing is held out, from 10 on at least two are: one may be broken.
    """
    if len(paths) < MIN_PAIRS_TO_HOLD_OUT:
        return set()
    # "0:" is a part of the key: another one would hold out other images.
    digests = [hashlib.sha1(f"0:{path}".encode()).digest()[:8] for path in paths]
    uniforms = [int.from_bytes(digest, "big") / 2**64 for digest in digests]
    held_out = {index for index, uniform in enumerate(uniforms) if uniform < HELD_OUT_FRACTION}
    # The smallest hashes are held out in any case, which the fraction of a small set may miss.
    return held_out | set(sorted(range(len(uniforms)), key=uniforms.__getitem__)[:MIN_HELD_OUT])


def stable_hash(*key: str) -> int:
    """Hash strings to an integer in [0, 2^32), the same on every machine."""
    return int.from_bytes(hashlib.sha1("/".join(key).encode()).digest()[:4], "big")
