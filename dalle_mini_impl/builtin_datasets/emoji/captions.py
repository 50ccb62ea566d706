"""Captions of emoji in English and Korean, each a few ways to say the same.

Unicode names each cell of role x gender x skin tone by hand, with exceptions ("남교사" beside
"여자 소방관"). Here the cells of a role are spelled by one rule from the name of its gender-neutral
form, so that a model can learn the parts and combine them. Source of the names: Unicode CLDR,
through the ``emoji`` package.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

from dalle_mini_impl.builtin_datasets.emoji.index import (
    FAMILY_MEMBERS,
    ZWJ,
    base_of,
    emoji_index,
    split_gender,
    tones_of,
)
from dalle_mini_impl.builtin_datasets.emoji.names import english_names, korean_names

_TWELVE = "zero one two three four five six seven eight nine ten eleven twelve"
_TWELVE_KO = "영 한 두 세 네 다섯 여섯 일곱 여덟 아홉 열 열한 열두"
_NUMBERS, _NUMBERS_KO = _TWELVE.split(), _TWELVE_KO.split()


@dataclass
class EmojiFacts:
    """What is known of one emoji, apart from any image of it."""

    emoji: str
    """The character sequence itself."""
    hexcode: str
    """Code points in upper-case hexadecimal, joined by "-", without variation selectors."""
    base: str
    """Hexcode without skin tones (of the plain pair, for two people with a tone each)."""
    kind: str
    """ "country flag", "clock", "keycap" or "other"."""
    group: str
    """Unicode group, for example "People & Body"."""
    role: str | None
    """English name of the gender-neutral form; None where neither gender nor tone varies."""
    gender: str | None
    """ "woman", "man", "person" (a neutral form that has gendered siblings) or None."""
    skin_tones: list[str] = field(default_factory=list)
    """One tone per person or hand that carries one."""
    texts: list[str] = field(default_factory=list)
    """English captions, the main one first."""
    texts_ko: list[str] = field(default_factory=list)
    """Korean captions, the main one first."""


def describe(hexcode: str) -> EmojiFacts | None:
    """Gather what is known of an emoji, captions included; None if it has no Unicode name."""
    index = emoji_index()
    if hexcode not in index.emoji:
        return None
    # 1. the facts, from the structure of the hexcode
    base = base_of(hexcode)
    neutral, gender = split_gender(base)
    if gender is None and neutral in index.neutral_forms:
        gender = "person"
    facts = EmojiFacts(
        emoji=index.emoji[hexcode],
        hexcode=hexcode,
        base=base,
        kind=_kind(hexcode),
        group=index.groups.get(base) or index.groups.get(neutral) or "People & Body",
        role=_english(neutral) if gender is not None or base in index.toned else None,
        gender=gender,
        skin_tones=tones_of(hexcode),
    )
    # 2. the captions, by kind
    codes = [code for code in base.split("-") if code != ZWJ]
    if facts.role is not None:
        _caption_person(facts)
    elif facts.kind == "country flag":
        _caption_flag(facts)
    elif facts.kind == "clock":
        _caption_clock(facts)
    elif facts.kind == "keycap":
        _caption_keycap(facts)
    elif len(codes) > 1 and set(codes) <= set(FAMILY_MEMBERS):
        _caption_family(facts, codes)
    else:
        _caption_thing(facts)
    facts.texts = list(dict.fromkeys(facts.texts))
    facts.texts_ko = list(dict.fromkeys(facts.texts_ko))
    return facts


def with_article(phrase: str) -> str | None:
    """Put "a" or "an" before a noun phrase; None where English has no article.

    That is before plurals, uncountable nouns and names.
    """
    table = english_names()
    # The noun stands before the first preposition.
    head = re.split(
        r" (?:with|without|of|in|at|and|on|showing|facing|behind|getting|lifting) |, ", phrase
    )[0].split()
    plural = head[-1].endswith("s") and not head[-1].endswith(("ss", "us", "bus"))
    if (
        plural
        or head[-1] in table.uncounted
        or head[0] in ("women", "men", "people", "two", "no", "globe")
    ):
        return None
    if phrase.startswith(table.proper) or (len(head) == 1 and phrase[0].isupper()):
        return None
    # By sound where the spelling misleads: "a unicorn", "an hourglass".
    vowel = phrase[0].lower() in "aeio" or phrase.startswith(("um", "un", "up", "hour", "x-ray"))
    if phrase.startswith(("uni", "euro", "ewe", "one-")):
        vowel = False
    return f"{'an' if vowel else 'a'} {phrase}"


def _kind(hexcode: str) -> str:
    if re.match(r"1F1[EF][0-9A-F]-1F1|1F3F4-E0067", hexcode):
        return "country flag"
    if re.fullmatch(r"1F55[0-9A-F]|1F56[0-7]", hexcode):
        return "clock"
    return "keycap" if hexcode.endswith("-20E3") or hexcode == "1F51F" else "other"


def _english(key: str) -> str:
    """Return the plain English name of an emoji without tone."""
    table = english_names()
    if key in table.names:
        return table.names[key]
    neutral, gender = split_gender(key)
    if gender is None or key in table.gendered:
        return emoji_index().english[key]
    # "person running" -> "woman running", "firefighter" -> "woman firefighter"
    phrase = _english(neutral)
    plural = {"woman": "women", "man": "men"}[gender]
    changed = re.sub(r"\bpeople\b", plural, re.sub(r"\bperson\b", gender, phrase))
    return changed if changed != phrase else f"{gender} {phrase}"


def _korean(key: str) -> str:
    """Return the plain Korean name of an emoji without tone."""
    table = korean_names()
    if key in table.names:
        return table.names[key]
    if key in table.japanese_buttons:
        return f"일본어 '{table.japanese_buttons[key]}' 버튼"
    neutral, gender = split_gender(key)
    if gender is None or key in english_names().gendered:
        return emoji_index().korean[key].replace("오른쪽을 향한 ", "오른쪽을 향해 ")
    phrase, word = _korean(neutral), {"woman": "여자", "man": "남자"}[gender]
    # "뛰는 사람" -> "뛰는 여자", "소방관" -> "여자 소방관"
    changed = re.sub(r"사람(?=들?$)", word, phrase)
    return changed if changed != phrase else f"{word} {phrase}"


def _caption_person(facts: EmojiFacts) -> None:
    phrases, phrases_ko = _person_phrases(facts)
    phrase, phrase_ko = phrases[0], phrases_ko[0]
    tones = list(dict.fromkeys(facts.skin_tones))
    if not tones:
        facts.texts = [phrase, *filter(None, [with_article(phrase)]), *phrases[1:]]
        facts.texts += [f"an emoji of {with_article(phrase) or phrase}", f"{phrase} emoji"]
        facts.texts_ko = [*phrases_ko, f"{phrase_ko} 이모지", f"{phrase_ko} 그림"]
        return
    # Two people may have a tone each: "light and dark skin tones".
    tone = " and ".join(tones) + (" skin tone" if len(tones) == 1 else " skin tones")
    spelled = [_with_tone(item, tone) for item in phrases]
    facts.texts = [spelled[0], *filter(None, [with_article(spelled[0])]), f"{phrase}, {tone}"]
    if len(tones) == 1:
        if not re.match(r"(two|women|men|people|woman and man)\b", phrase):
            facts.texts.append(f"{tone} {phrase}")
        facts.texts.append(spelled[0].removesuffix(" tone"))
    for item, caption in zip(phrases[1:], spelled[1:], strict=True):
        facts.texts += [caption, f"{item}, {tone}"]
    tone_ko = "과 ".join(korean_names().tones[item] for item in tones)
    cldr_ko = "와 ".join(korean_names().tones_cldr[item] for item in tones)
    facts.texts_ko = [f"{tone_ko}의 {item}" for item in phrases_ko]
    facts.texts_ko += [
        f"{phrase_ko}, {tone_ko}",
        f"{cldr_ko}의 {phrase_ko}",
        f"{phrase_ko}, {cldr_ko}",
    ]


def _person_phrases(facts: EmojiFacts) -> tuple[list[str], list[str]]:
    """List ways to name a person or a hand without its tone, in English and in Korean."""
    phrases, phrases_ko = [_english(facts.base)], [_korean(facts.base)]
    # "female firefighter", but no "female person running": a profession is a noun without "person".
    profession = re.search(r"\b(person|people)\b", facts.role or "") is None
    if (
        facts.gender in ("woman", "man")
        and profession
        and facts.base not in english_names().gendered
        and facts.base not in english_names().names
    ):
        phrases.append(f"{'female' if facts.gender == 'woman' else 'male'} {facts.role}")
    phrases += _aliases(facts.base)[:2]
    # "여자 소방관" is also "여성 소방관", but a girl stays "여자아이".
    if re.search(r"[여남]자(?!아이)", phrases_ko[0]):
        phrases_ko.append(re.sub(r"([여남])자(?!아이)", r"\1성", phrases_ko[0]))
    return phrases, phrases_ko


def _with_tone(phrase: str, tone: str) -> str:
    if " with " not in phrase:
        return f"{phrase} with {tone}"
    return f"{phrase}, {tone}" if phrase.endswith("facing right") else f"{phrase} and {tone}"


def _caption_flag(facts: EmojiFacts) -> None:
    index, table, table_ko = emoji_index(), english_names(), korean_names()
    codes = facts.hexcode.split("-")
    # Regional indicators spell the region's code; the flags of England and Scotland have none.
    region = "".join(
        chr(int(code, 16) - 0x1F1E6 + ord("A")) for code in codes if code.startswith("1F1")
    )
    name = table.regions.get(region, index.english[facts.hexcode])
    if name.endswith((" Islands", " Territory", " Republic")) and region not in table.regions:
        name = f"the {name}"
    facts.texts = [f"flag of {name}", f"the flag of {name}", f"{name.removeprefix('the ')} flag"]
    if region in table.region_synonyms:
        other = table.region_synonyms[region]
        facts.texts += [f"flag of {other}", f"{other.removeprefix('the ')} flag"]
    facts.texts.append(f"an emoji of the flag of {name}")
    name_ko = re.sub(r"\(.*\)", "", index.korean[facts.hexcode].removeprefix("깃발 ")).strip()
    name_ko = table_ko.regions.get(region, name_ko)
    # 국기 is the flag of a state; other regions have a 깃발.
    noun = "깃발" if not region or region in table_ko.territories else "국기"
    facts.texts_ko = [f"{name_ko} {noun}", f"{name_ko}의 {noun}", f"{name_ko} 깃발"]
    if region in table_ko.region_synonyms:
        facts.texts_ko.append(f"{table_ko.region_synonyms[region]} {noun}")
    if region in table_ko.flag_nicknames:
        facts.texts_ko.append(table_ko.flag_nicknames[region])


def _caption_clock(facts: EmojiFacts) -> None:
    place = int(facts.hexcode, 16) - 0x1F550  # twelve full hours, then twelve half hours
    hour, half = place % 12 + 1, place >= 12
    word = _NUMBERS[hour] + ("-thirty" if half else " o'clock")
    digits = f"{hour}:{'30' if half else '00'}"
    facts.texts = [f"clock showing {word}", f"a clock showing {word}", f"clock at {word}", word]
    facts.texts += [f"clock showing {digits}", f"clock face, {word}"]
    facts.texts += [f"clock showing half past {_NUMBERS[hour]}"] if half else [f"{hour} o'clock"]
    word_ko = f"{_NUMBERS_KO[hour]} 시" + (" 반" if half else "")
    facts.texts_ko = [
        f"{word_ko}{'을' if half else '를'} 가리키는 시계",
        f"시계, {word_ko}",
        f"{word_ko} 시계",
    ]
    facts.texts_ko += [word_ko, f"{hour}시{' 반을' if half else '를'} 가리키는 시계"]


def _caption_keycap(facts: EmojiFacts) -> None:
    key = emoji_index().english[facts.hexcode].removeprefix("keycap ")
    word = _NUMBERS[int(key)] if key.isdigit() else {"#": "hash sign", "*": "asterisk"}[key]
    facts.texts = [
        f"keycap {key}",
        f"{key} keycap",
        f"keycap showing {word}",
        f"{word} on a keycap",
    ]
    key_ko = f"숫자 {key}" if key.isdigit() else {"#": "우물 정자", "*": "별표"}[key]
    facts.texts_ko = [f"{key_ko} 키캡", f"키캡 {key}", f"{key_ko} 버튼"]


def _caption_family(facts: EmojiFacts, codes: list[str]) -> None:
    parts, parts_ko = [], []
    for code, count in Counter(codes).items():
        one, many, word_ko = FAMILY_MEMBERS[code]
        parts.append(
            f"{_NUMBERS[count]} {many}" if count > 1 else f"{'an' if one == 'adult' else 'a'} {one}"
        )
        parts_ko.append(f"{word_ko} {_NUMBERS_KO[count]} 명" if count > 1 else word_ko)
    listed = ", ".join(parts[:-1]) + " and " + parts[-1]
    facts.texts = [f"family of {listed}", f"a family of {listed}", f"family, {listed}"]
    # The particle follows the final sound, which is a consonant in 명.
    last = "으로" if parts_ko[-1].endswith("명") else "로"
    listed_ko = ", ".join(parts_ko)
    facts.texts_ko = [f"{listed_ko}{last} 이루어진 가족", f"가족, {listed_ko}"]


def _caption_thing(facts: EmojiFacts) -> None:
    phrase, phrase_ko = _english(facts.base), _korean(facts.base)
    words, table = phrase.split(), english_names()
    article = with_article(phrase)
    if facts.group == "Symbols" and (words[-1] not in table.counted_symbols or words[0].isupper()):
        article = None
    facts.texts = [phrase]
    if article is not None:
        facts.texts += [article, f"an emoji of {article}"]
    elif words[-1].endswith("s"):
        facts.texts.append(f"an emoji of {phrase}")
    facts.texts += [f"{phrase} emoji", *table.synonyms.get(facts.base, ()), *_aliases(facts.base)]
    facts.texts_ko = [phrase_ko, f"{phrase_ko} 이모지", f"{phrase_ko} 그림"]


def _aliases(base: str) -> list[str]:
    """List the aliases of the ``emoji`` package that read as captions and mean this emoji only."""
    index = emoji_index()
    # An alias that differs from the name by a hyphen says nothing new.
    main = re.sub(r"[-']", " ", _english(base).lower())
    good = []
    for alias in index.aliases.get(base, []):
        plain = (
            re.fullmatch(r"(?!arrow|heavy|lower|couplekiss)[a-z][a-z' -]{3,}", alias) is not None
        )
        reordered = alias.startswith("arrows") or alias.endswith(("blood type", "traffic light"))
        if plain and not reordered and alias not in index.ambiguous | english_names().bad_aliases:
            good.append(alias)
    return [alias for alias in good if re.sub(r"[-']", " ", alias) != main]
