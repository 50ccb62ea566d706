"""Which emoji are held out, and which pictures would leak: splits for compositional generalisation.

A draw is a function of hexcodes alone (sha1), so the same emoji is held out at every picture size
and in every style. Held out are gender x tone cells of a role whose other cells are seen
(`test_compose`), tone pairs of two people (`test_compose2`), clock faces (`test_clock`) and whole
concepts (`val_novel`, where failure is expected).
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from dalle_mini_impl.builtin_datasets.emoji import names
from dalle_mini_impl.builtin_datasets.emoji.captions import EmojiFacts
from dalle_mini_impl.builtin_datasets.emoji.index import (
    base_of,
    emoji_index,
    split_gender,
    tones_of,
)
from dalle_mini_impl.data.splits import stable_hash

SPLITS = ("train", "test_compose", "test_compose2", "test_clock", "val_novel")
GENDERS = ("woman", "man", "person")
TONES = tuple(names.TONES.values())
NEAR_IDENTICAL_MSE = 2e-4
"""Mean squared error on [0, 1] at 32 x 32 below which two pictures count as the same one."""
_NOVEL_PER_MILLE = 45
_CLOCKS_HELD_OUT = 6


@lru_cache(maxsize=1)
def full_roles() -> frozenset[str]:
    """Neutral hexcodes of the roles that Unicode names in all 3 genders x 5 skin tones."""
    cells: dict[str, set[tuple[str, str]]] = {}
    for hexcode in emoji_index().emoji:
        tones = tones_of(hexcode)
        if len(tones) == 1:
            neutral, gender = split_gender(base_of(hexcode))
            cells.setdefault(neutral, set()).add((gender or "person", tones[0]))
    size = len(GENDERS) * len(TONES)
    return frozenset(neutral for neutral, found in cells.items() if len(found) == size)


def held_out_cells(neutral: str) -> set[tuple[str, str]]:
    """The two held-out (gender, tone) cells of a full role; they share neither gender nor tone.

    Args:
        neutral: hexcode of the role's neutral form.

    Returns:
        Two cells; every gender is still seen in four tones, every tone in two genders.
    """
    gender, tone = stable_hash("gender", neutral) % 3, stable_hash("tone", neutral) % 5
    other_gender = (gender + 1 + stable_hash("other gender", neutral) % 2) % 3
    other_tone = (tone + 1 + stable_hash("other tone", neutral) % 4) % 5
    return {(GENDERS[gender], TONES[tone]), (GENDERS[other_gender], TONES[other_tone])}


@lru_cache(maxsize=1)
def held_out_clocks() -> frozenset[str]:
    """The clock faces that are held out, out of 24."""
    clocks = [f"{code:X}" for code in range(0x1F550, 0x1F568)]
    free = [hexcode for hexcode in clocks if hexcode not in names.PROTECTED]
    return frozenset(
        sorted(free, key=lambda hexcode: stable_hash("clock", hexcode))[:_CLOCKS_HELD_OUT]
    )


def split_of(facts: EmojiFacts) -> str:
    """Split of an emoji, before pictures are compared.

    Args:
        facts: as from `emoji_captions.describe`.

    Returns:
        One of `SPLITS`.
    """
    if facts.hexcode not in names.PROTECTED:
        if len(facts.skin_tones) == 1 and _is_held_out_cell(facts):
            return "test_compose"
        if len(set(facts.skin_tones)) == 2 and stable_hash("pair", facts.hexcode) % 8 == 0:
            return "test_compose2"
        if facts.hexcode in held_out_clocks():
            return "test_clock"
        thing = facts.kind == "other" and facts.role is None and facts.group != "Component"
        if thing and stable_hash("novel", facts.base) % 1000 < _NOVEL_PER_MILLE:
            return "val_novel"
    return "train"


def _is_held_out_cell(facts: EmojiFacts) -> bool:
    """Whether this tone is held out: of a full role's grid, or of half the other bases."""
    neutral = split_gender(facts.base)[0]
    if neutral in full_roles():
        return (facts.gender or "person", facts.skin_tones[0]) in held_out_cells(neutral)
    held_out = TONES[stable_hash("gesture tone", facts.base) % len(TONES)]
    return (
        facts.gender is None
        and stable_hash("gesture", facts.base) % 2 == 0
        and facts.skin_tones[0] == held_out
    )


def without_leaks(
    facts: Sequence[EmojiFacts], splits: Sequence[str], pixels: np.ndarray
) -> list[str | None]:
    """Keep one picture of each identical group, and no held-out picture that training nearly shows.

    Args:
        facts: the emoji of one style.
        splits: their splits, in the same order.
        pixels: their pictures, uint8 (pictures, 64, 64, 3).

    Returns:
        The split of each picture, None where it is dropped. Of identical pictures the one kept is a
        training picture before a held-out one, a known flag before others, a short sequence
        before a long one. A held-out picture that is nearly a training picture becomes "train".
    """
    order = sorted(
        range(len(facts)),
        key=lambda index: (
            splits[index] != "train",
            facts[index].hexcode not in names.PREFERRED,
            len(facts[index].hexcode.split("-")),
            facts[index].hexcode,
        ),
    )
    final: list[str | None] = list(splits)
    seen: set[bytes] = set()
    for index in order:
        fingerprint = hashlib.sha1(pixels[index].tobytes()).digest()
        if fingerprint in seen:
            final[index] = None
        seen.add(fingerprint)
    train = [index for index, split in enumerate(final) if split == "train"]
    held_out = [index for index, split in enumerate(final) if split not in (None, "train")]
    if train and held_out:
        for index, error in zip(held_out, _nearest_error(pixels, held_out, train), strict=True):
            if error < NEAR_IDENTICAL_MSE:
                final[index] = "train"
    return final


def _nearest_error(pixels: np.ndarray, held_out: list[int], train: list[int]) -> np.ndarray:
    """Mean squared error at 32 x 32, pixels in [0, 1], to the nearest training picture."""
    count = len(pixels)
    small = pixels.reshape(count, 32, 2, 32, 2, 3).astype(np.float32).mean(axis=(2, 4)) / 255.0
    flat = small.reshape(count, -1) - 0.5
    seen, unseen = flat[train], flat[held_out]
    squared = (unseen**2).sum(1)[:, None] + (seen**2).sum(1)[None] - 2.0 * unseen @ seen.T
    return np.maximum(squared.min(axis=1), 0.0) / flat.shape[1]
