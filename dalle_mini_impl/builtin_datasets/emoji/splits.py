"""Which emoji are held out, and which images would leak: splits for compositional generalization.

The choice is a function of hexcodes alone (sha1): the same emoji is held out at every image size
 and in every style. Held out are gender x tone cells of a role whose other cells are seen
 (``test_compose``), tone pairs of two people (``test_compose2``), clock faces (``test_clock``) and
 whole concepts (``val_novel``, where failure is expected).
"""

import hashlib
from collections.abc import Sequence
from functools import cache

import numpy as np

from dalle_mini_impl.builtin_datasets.emoji.captions import EmojiFacts
from dalle_mini_impl.builtin_datasets.emoji.index import (
    base_of,
    emoji_index,
    split_gender,
    tones_of,
)
from dalle_mini_impl.builtin_datasets.emoji.names import TONES as TONE_NAMES
from dalle_mini_impl.builtin_datasets.emoji.names import english_names
from dalle_mini_impl.data.splits import stable_hash

SPLITS = ("train", "test_compose", "test_compose2", "test_clock", "val_novel")
GENDERS = ("woman", "man", "person")
TONES = tuple(TONE_NAMES.values())
# Mean squared error on [0, 1] at 32 x 32 below which two images count as the same one.
NEAR_IDENTICAL_MSE = 2e-4
_NOVEL_PER_MILLE = 45
_CLOCKS_HELD_OUT = 6


@cache
def full_roles() -> frozenset[str]:
    """List the neutral hexcodes of the roles that Unicode names in all 3 genders x 5 skin tones."""
    cells: dict[str, set[tuple[str, str]]] = {}
    for hexcode in emoji_index().emoji:
        tones = tones_of(hexcode)
        if len(tones) == 1:
            neutral, gender = split_gender(base_of(hexcode))
            cells.setdefault(neutral, set()).add((gender or "person", tones[0]))
    # Roles with fewer cells cannot test composition.
    size = len(GENDERS) * len(TONES)
    return frozenset(neutral for neutral, found in cells.items() if len(found) == size)


def held_out_cells(neutral: str) -> set[tuple[str, str]]:
    """Choose the two held-out (gender, tone) cells of a full role.

    They share neither gender nor tone, so training still sees every gender in four tones and every
    tone in two genders.
    """
    # Independent hashes for each choice; the second cell differs in both.
    gender, tone = stable_hash("gender", neutral) % 3, stable_hash("tone", neutral) % 5
    other_gender = (gender + 1 + stable_hash("other gender", neutral) % 2) % 3
    other_tone = (tone + 1 + stable_hash("other tone", neutral) % 4) % 5
    return {(GENDERS[gender], TONES[tone]), (GENDERS[other_gender], TONES[other_tone])}


@cache
def held_out_clocks() -> frozenset[str]:
    """Choose the clock faces that are held out, of 24."""
    clocks = [f"{code:X}" for code in range(0x1F550, 0x1F568)]
    free = [hexcode for hexcode in clocks if hexcode not in english_names().protected]
    return frozenset(
        sorted(free, key=lambda hexcode: stable_hash("clock", hexcode))[:_CLOCKS_HELD_OUT]
    )


def split_of(facts: EmojiFacts) -> str:
    """Name the split of an emoji, before images are compared: one of ``SPLITS``."""
    if facts.hexcode not in english_names().protected:
        # From the most to the least specific: each emoji has one split.
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
    """Tell whether this tone is held out: of a full role's grid, or of half the other bases."""
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
    """Drop identical images, and move held-out ones that training nearly shows to "train".

    ``pixels`` are uint8, (images, 64, 64, 3). Of identical images the one kept is a training image
    before a held-out one, a known flag before others, a short sequence before a long one. Returns
    the split of each image, None where it is dropped.
    """
    # 1. drop what is identical
    order = sorted(
        range(len(facts)),
        key=lambda index: (
            splits[index] != "train",
            facts[index].hexcode not in english_names().preferred,
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
    # 2. what training nearly shows measures nothing
    train = [index for index, split in enumerate(final) if split == "train"]
    held_out = [index for index, split in enumerate(final) if split not in (None, "train")]
    if train and held_out:
        for index, error in zip(held_out, _nearest_error(pixels, held_out, train), strict=True):
            if error < NEAR_IDENTICAL_MSE:
                final[index] = "train"
    return final


def _nearest_error(pixels: np.ndarray, held_out: list[int], train: list[int]) -> np.ndarray:
    """Mean squared error at 32 x 32, pixels in [0, 1], to the nearest training image."""
    count = len(pixels)
    # (images, 32, 32, 3): the mean of each 2 x 2 block
    small = pixels.reshape(count, 32, 2, 32, 2, 3).astype(np.float32).mean(axis=(2, 4)) / 255.0
    flat = small.reshape(count, -1) - 0.5
    seen, unseen = flat[train], flat[held_out]
    # |a - b|^2 = |a|^2 + |b|^2 - 2 a b, as one matrix product of held out against train
    squared = (unseen**2).sum(1)[:, None] + (seen**2).sum(1)[None] - 2.0 * unseen @ seen.T
    return np.maximum(squared.min(axis=1), 0.0) / flat.shape[1]
