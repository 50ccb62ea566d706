"""Which images are for training and which for measuring.

A source may name its splits; records without a name are then "train". In a source that names none,
a fixed 5 % become "val", chosen by a hash of each path. "val" and "validation" mean the same.
"""

import hashlib
from collections.abc import Sequence

from dalle_mini_impl.data.readers.records import RawPair
from dalle_mini_impl.errors import UserError

HELD_OUT_FRACTION = 0.05
MIN_PAIRS_TO_HOLD_OUT = 10
MIN_HELD_OUT = 2
TRAIN = "train"
VALIDATION = ("val", "validation")


def choose_split(source: str, listed: Sequence[RawPair], split: str | None) -> list[RawPair]:
    """Picks the records of one split.

    Args:
        source: Name of the source, for messages.
        listed: All its records.
        split: The split expected; None for everything.

    Returns:
        The records of that split, in their order.

    Raises:
        UserError: There is no such split, or too little to hold any out.
    """
    if split is None:
        return list(listed)
    if not any(pair.split for pair in listed):
        return _choose_unnamed(source, listed, split)
    expected = VALIDATION if split in VALIDATION else (split,)
    chosen = [pair for pair in listed if (pair.split or TRAIN) in expected]
    if not chosen:
        names = sorted({pair.split or TRAIN for pair in listed})
        raise UserError(f"{source} has no split {split!r}, it has {', '.join(names)}")
    return chosen


def _choose_unnamed(source: str, listed: Sequence[RawPair], split: str) -> list[RawPair]:
    if split not in (TRAIN, *VALIDATION):
        raise UserError(
            f"{source} names no splits, so expected split 'train' or 'val', not {split!r}"
        )
    kept, held_out = held_out_split([pair.path for pair in listed])
    if split == TRAIN:
        return [listed[index] for index in kept]
    if not held_out:
        raise UserError(
            f"{source} names no splits and has {len(listed)} pairs; expected at least "
            f"{MIN_PAIRS_TO_HOLD_OUT} to hold some of them out as {split!r}"
        )
    return [listed[index] for index in held_out]


def split_names(listed: Sequence[RawPair]) -> list[str]:
    """Names the split of each record, as `choose_split` sees it.

    Args:
        listed: All records of a source.

    Returns:
        One name per record; "train" and "val" where the source names none.
    """
    if any(pair.split for pair in listed):
        return [pair.split or TRAIN for pair in listed]
    held_out = set(held_out_split([pair.path for pair in listed])[1])
    return [VALIDATION[0] if index in held_out else TRAIN for index in range(len(listed))]


def held_out_split(
    paths: Sequence[str], *, fraction: float = HELD_OUT_FRACTION, seed: int = 0
) -> tuple[list[int], list[int]]:
    """Parts a set in two by the sha1 of each path, so a pair stays where it is when others come.

    Args:
        paths: `Pair.path` of each pair.
        fraction: Expected share to hold out, in [0, 1).
        seed: Another seed, another choice.

    Returns:
        Indices kept and indices held out. Below 10 pairs nothing is held out, from 10 on at least
        two are: one may be broken.

    Raises:
        ValueError: `fraction` outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction is {fraction}, expected 0 <= fraction < 1")
    if len(paths) < MIN_PAIRS_TO_HOLD_OUT or fraction == 0:
        return list(range(len(paths))), []
    digests = [hashlib.sha1(f"{seed}:{path}".encode()).digest()[:8] for path in paths]
    uniforms = [int.from_bytes(digest, "big") / 2**64 for digest in digests]
    held_out = {index for index, uniform in enumerate(uniforms) if uniform < fraction}
    held_out |= set(sorted(range(len(uniforms)), key=uniforms.__getitem__)[:MIN_HELD_OUT])
    return [index for index in range(len(paths)) if index not in held_out], sorted(held_out)


def stable_hash(*key: str) -> int:
    """A fixed pseudo-random number of a key.

    Args:
        *key: strings that name the generate.

    Returns:
        An integer in [0, 2^32): the first four bytes of the sha1 of the joined key.
    """
    return int.from_bytes(hashlib.sha1("/".join(key).encode()).digest()[:4], "big")
