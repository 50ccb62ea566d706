"""Pairs of texts for translation: the English and Korean names of emoji, or a table of your own.

Names of emoji come from Unicode CLDR through the package ``emoji``; its English aliases are further
sources of the same Korean name, for training alone. Names that differ by skin tone or gender only
("woman firefighter: dark skin tone", "firefighter"), by their hexcodes or by their words, are one
family, and so are pairs that share a text. Two kinds of names are held out: some families as a
whole, whose words are mostly new; and, of other families, some names with a skin tone, which are
new combinations of known words.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dalle_mini_impl.builtin_datasets.emoji.index import (
    base_of,
    emoji_index,
    split_gender,
    tones_of,
)
from dalle_mini_impl.data.splits import stable_hash
from dalle_mini_impl.errors import UserError

EMOJI = "emoji"
_VARYING = re.compile(
    r"\b((medium-)?(light|dark)|medium) skin tone\b"
    r"|\b(man|woman|men|women|boy|girl|boys|girls|person|people|child)\b"
)


@dataclass(frozen=True)
class TextPair:
    """A text and its translation."""

    source: str
    target: str
    family: str
    """Names that are variants of one thing."""
    is_plain: bool = True
    """False for names with a skin tone, of which there are many alike."""


@dataclass(frozen=True)
class TextPairs:
    """What is learned and what is measured."""

    train: list[TextPair]
    held_out: list[TextPair]

    def is_new_family(self) -> list[bool]:
        """Tell for each held-out pair whether its whole family is held out."""
        known = {pair.family for pair in self.train}
        return [pair.family not in known for pair in self.held_out]

    def family_weights(self) -> list[float]:
        """Weigh each training pair by 1 / sqrt(size of its family), so that no large one rules."""
        sizes = Counter(pair.family for pair in self.train)
        return [sizes[pair.family] ** -0.5 for pair in self.train]


def load_text_pairs(source: str, *, held_out_percent: int) -> TextPairs:
    """Read pairs and hold some families and some combinations out, always the same ones.

    Args:
        source: ``emoji``, or a UTF-8 file with a source and a target per line, a tab between.
        held_out_percent: Percentage of the families to hold out, and of the names with a skin tone
            of the others, 1 to 50.
    """
    pairs = _emoji_pairs() if source == EMOJI else _read_table(Path(source))
    families = _merge_families(pairs)
    named = [
        (TextPair(pair.source, pair.target, families[pair.family], pair.is_plain), is_main)
        for pair, is_main in pairs.items()
    ]

    def is_selected(purpose: str, name: str) -> bool:
        return stable_hash(purpose, name) % 100 < held_out_percent

    # A combination is chosen by its target, so that no other source of the same name is learned.
    is_held_out = [
        is_selected("translation", pair.family)
        or (not pair.is_plain and is_selected("translation of a combination", pair.target))
        for pair, _ in named
    ]
    # Aliases are further sources of a known name: for training alone.
    train = [pair for (pair, _), held in zip(named, is_held_out, strict=True) if not held]
    held_out = [
        pair for (pair, is_main), held in zip(named, is_held_out, strict=True) if held and is_main
    ]
    if not train or not held_out:
        raise UserError(
            f"data.source: {source} gives {len(train)} pairs to learn and {len(held_out)} to "
            "measure; expected more pairs"
        )
    return TextPairs(train, held_out)


def nearest_targets(sources: Sequence[str], train: Sequence[TextPair]) -> list[str]:
    """Answer each text with the translation of the training source that is most like it.

    That is the one with the largest Dice overlap of character trigrams, the first of equal ones.
    """
    known = [_trigrams(pair.source) for pair in train]
    # An inverted index: only sources that share a trigram are compared.
    places: dict[str, list[int]] = {}
    for number, trigrams in enumerate(known):
        for trigram in trigrams:
            places.setdefault(trigram, []).append(number)
    predictions = []
    for source in sources:
        own = _trigrams(source)
        shared = Counter(number for trigram in own for number in places.get(trigram, ()))
        best = max(
            sorted(shared) or [0],
            key=lambda number: 2 * shared[number] / (len(own) + len(known[number])),
        )
        predictions.append(train[best].target)
    return predictions


def _trigrams(text: str) -> set[str]:
    padded = f"  {text.lower()}  "
    return {padded[start : start + 3] for start in range(len(padded) - 2)}


def _emoji_pairs() -> dict[TextPair, bool]:
    """List all names, and whether each is the emoji's main one."""
    index = emoji_index()
    pairs: dict[TextPair, bool] = {}
    for hexcode, english in sorted(index.english.items()):
        family, is_plain = split_gender(base_of(hexcode))[0], not tones_of(hexcode)
        korean = index.korean[hexcode]
        for source in dict.fromkeys([english, *index.aliases[hexcode]]):
            pair = TextPair(source, korean, family, is_plain)
            pairs[pair] = pairs.get(pair, False) or source == english
    return pairs


def _read_table(path: Path) -> dict[TextPair, bool]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.source: cannot read {path}: {error}; expected {EMOJI!r} or a UTF-8 file with a "
            "source and a target per line"
        ) from None
    pairs = {}
    for number, line in enumerate(lines, start=1):
        parts = [part.strip() for part in line.split("\t")]
        if len(parts) != 2 or not all(parts):
            raise UserError(
                f"data.source: {path}, line {number}: got {line[:60]!r}, expected a source, a tab "
                "and a target"
            )
        pairs[TextPair(parts[0], parts[1], f"line {number}")] = True
    return pairs


def _merge_families(pairs: Iterable[TextPair]) -> dict[str, str]:
    """Join families that share a text, but for skin tones and genders; name each by its first."""
    # Union-find over families and texts.
    parents: dict[str, str] = {}

    def root(name: str) -> str:
        parents.setdefault(name, name)
        while parents[name] != name:
            parents[name] = parents[parents[name]]
            name = parents[name]
        return name

    # Each text is a node too, so families with a text in common end up in one tree.
    for pair in pairs:
        words = " ".join(_VARYING.sub(" ", pair.source.lower()).split())
        for key in (f"source {words}", f"target {pair.target.lower()}"):
            first, second = sorted((root(pair.family), root(key)))
            parents[second] = first
    return {pair.family: root(pair.family) for pair in pairs}
