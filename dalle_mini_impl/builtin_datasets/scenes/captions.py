"""Captions (English, Korean) and facts of scenes, and files of them.

Each caption leaves parts out at random: what it does not mention may be anything. So a model learns
that "a cat" has any color, and that "a red cat" is red before any background.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dalle_mini_impl.builtin_datasets.emoji.styles import STYLES
from dalle_mini_impl.builtin_datasets.generated_folder import write_generated_folder
from dalle_mini_impl.builtin_datasets.scenes import DEFAULT_KINDS
from dalle_mini_impl.builtin_datasets.scenes.facts import Fact, ObjectPattern, background_name
from dalle_mini_impl.builtin_datasets.scenes.scene import (
    DIRECTIONS,
    SPLITS,
    Background,
    Scene,
    make_scene,
    render_scene,
)
from dalle_mini_impl.builtin_datasets.scenes.things import Thing, all_things, regular_plural
from dalle_mini_impl.errors import UserError

NUM_TEXTS, NUM_TEXTS_KO = 4, 2
_NUMBERS = ("no", "one", "two", "three", "four")
_SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
_RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "bigger than": ("bigger than", "larger than"),
    "smaller than": ("smaller than",),
}
_OPPOSITE = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
    "bigger than": "smaller than",
    "smaller than": "bigger than",
}
_GROUND_WORDS = {
    "grass": ("on grass", "on the grass", "in a meadow"),
    "beach": ("on a beach", "on the beach", "on sand"),
    "snow": ("in the snow", "on snow"),
    "night": ("at night", "under a night sky"),
    "sea": ("at sea", "on the sea", "on water"),
}
_KOREAN_COLORS = {
    "red": "빨간",
    "orange": "주황색",
    "yellow": "노란",
    "green": "초록색",
    "blue": "파란",
    "purple": "보라색",
    "pink": "분홍색",
    "brown": "갈색",
    "black": "검은",
    "gray": "회색",
    "white": "하얀",
}
# As nouns, before "에서".
_KOREAN_COLOR_NOUNS = {
    **_KOREAN_COLORS,
    "red": "빨간색",
    "yellow": "노란색",
    "blue": "파란색",
    "black": "검은색",
    "white": "하얀색",
}
_KOREAN_GROUNDS = {
    "grass": "풀밭 위의",
    "beach": "해변의",
    "snow": "눈밭 위의",
    "night": "밤하늘 아래의",
    "sea": "바다 위의",
}
_KOREAN_RELATIONS = {
    "left of": "왼쪽에 있는",
    "right of": "오른쪽에 있는",
    "above": "위에 있는",
    "below": "아래에 있는",
    "bigger than": "보다 큰",
    "smaller than": "보다 작은",
}
_KOREAN_SIZES = {"small": "작은", "large": "큰"}
_KOREAN_NUMBERS = ("", "한", "두", "세", "네")
_KOREAN_COUNTERS = {"animal": "마리", "vehicle": "대", "tree": "그루", "flower": "송이"}


@dataclass(frozen=True)
class Mention:
    """Which parts of a scene a caption states."""

    colors: tuple[bool, ...]
    """Of each object."""
    background: bool
    size: bool
    """Of a single thing."""
    relation: tuple[int, str, int] | None
    """One of the scene's; None names the things only."""
    words: str = "name"
    """"name", "synonym" or "unseen_synonym": the field of ``Thing`` that names the things."""


@dataclass(frozen=True)
class Caption:
    """A scene in words."""

    texts: tuple[str, ...]
    """Each states parts of its own; the first states ``facts``."""
    texts_ko: tuple[str, ...]
    facts: tuple[Fact, ...]
    """An image shows the first text if and only if all of them hold."""


def describe_scene(scene: Scene) -> Caption:
    """Put a scene into words and facts, as a function of the scene alone."""
    # Random numbers of its own: other wordings must not change the scenes.
    rng = random.Random(f"wording {scene.split} {scene.seed}")
    mentions = [_choose_mention(scene, rng) for _ in range(NUM_TEXTS)]
    texts = [_english(scene, mention, rng) for mention in mentions]
    texts_ko = [_korean(scene, mention, rng) for mention in mentions[:NUM_TEXTS_KO]]
    facts = _facts(scene, mentions[0])
    # Without repeats, in this order.
    return Caption(tuple(dict.fromkeys(texts)), tuple(dict.fromkeys(texts_ko)), facts)


def prepare_scenes(
    out: Path,
    *,
    counts: Mapping[str, int],
    image_size: int = 64,
    kinds: Sequence[str] = DEFAULT_KINDS,
    styles: Sequence[str] = ("twemoji",),
    num_things: int | None = None,
    npm_dir: Path | None = None,
) -> int:
    """Write a data set of scenes and its credits; return how many images.

    See ``write_generated_folder`` and ``make_scene``. ``kinds`` are those of training scenes.
    """
    if not styles or not set(styles) <= set(STYLES):
        raise UserError(f"styles: got {tuple(styles)!r}, expected some of {tuple(STYLES)}")

    def make_image(split: str, seed: int) -> tuple[Image.Image, dict[str, Any]]:
        scene = make_scene(
            seed, split=split, kinds=kinds, styles=styles, num_things=num_things, npm_dir=npm_dir
        )
        caption = describe_scene(scene)
        row = {
            "text": caption.texts[0],
            "texts": caption.texts,
            "text_ko": caption.texts_ko[0],
            "texts_ko": caption.texts_ko,
            "style": scene.style,
            "facts": [str(fact) for fact in caption.facts],
        }
        return render_scene(scene, image_size, npm_dir=npm_dir), row

    count = write_generated_folder(
        out, make_image, counts=counts, splits=SPLITS, writer="prepare_scenes"
    )
    credits = "\n".join(STYLES[style].credit for style in styles)
    (out / "ATTRIBUTION.txt").write_text(credits + "\n", encoding="utf-8")
    return count


def _choose_mention(scene: Scene, rng: random.Random) -> Mention:
    """Choose what a caption states: at random in training, by the task in a test."""
    task = scene.split.removeprefix("test_")
    if task == "train":
        return Mention(
            tuple(rng.random() < 0.7 for _ in scene.objects),
            rng.random() < 0.5,
            scene.kind == "single" and rng.random() < 0.3,
            rng.choice(scene.relations) if scene.relations and rng.random() < 0.7 else None,
            rng.choice(("name", "name", "synonym")),
        )
    states_color = task in ("colors", "attribution")
    return Mention(
        (states_color,) * len(scene.objects),
        task == "colors" and rng.random() < 0.5,
        False,
        scene.relations[0] if task == "position" else None,
        "unseen_synonym" if task == "words" else "name",
    )


def _facts(scene: Scene, mention: Mention) -> tuple[Fact, ...]:
    """List what a caption claims."""
    patterns = [
        ObjectPattern(color=item.color if has_color else None, thing=item.thing)
        for item, has_color in zip(scene.objects, mention.colors, strict=True)
    ]
    facts = [Fact("count", len(scene.objects))]
    if scene.kind == "pair":
        facts += [Fact("count", 1, pattern) for pattern in patterns]
        if mention.relation is not None:
            a, relation, b = mention.relation
            facts.append(Fact("relation", relation, patterns[a], patterns[b]))
    else:
        # One fact per attribute, so that an evaluation can tell a wrong color from a wrong thing.
        first, number = patterns[0], len(scene.objects)
        facts.append(Fact("count", number, ObjectPattern(thing=first.thing)))
        if first.color is not None:
            facts.append(Fact("count", number, ObjectPattern(color=first.color)))
        if mention.size:
            facts.append(Fact("count", number, ObjectPattern(size=scene.objects[0].size)))
    if mention.background:
        facts.append(Fact("background", background_name(scene.background)))
    return tuple(facts)


def _english(scene: Scene, mention: Mention, rng: random.Random) -> str:
    things = [all_things()[item.thing] for item in scene.objects]
    colors = [
        item.color if has_color else None
        for item, has_color in zip(scene.objects, mention.colors, strict=True)
    ]
    if scene.kind == "count":
        noun = things[0].plural
        if mention.words == "synonym" and things[0].synonym and " of " not in things[0].synonym:
            noun = regular_plural(things[0].synonym)
        number = len(scene.objects)
        amount = rng.choice((_NUMBERS[number], _NUMBERS[number], str(number)))
        text = " ".join(filter(None, (amount, colors[0], noun)))
    elif scene.kind == "single":
        size = rng.choice(_SIZE_WORDS[scene.objects[0].size]) if mention.size else None
        text = _noun_phrase(things[0], size, colors[0], mention.words, rng)
    else:
        phrases = [
            _noun_phrase(thing, None, color, mention.words)
            for thing, color in zip(things, colors, strict=True)
        ]
        a, b = rng.sample((0, 1), 2)
        words = "and"
        if mention.relation is not None:
            subject, relation, _ = mention.relation
            # "a above b" and "b below a" make the same claim.
            words = rng.choice(_RELATION_WORDS[relation if subject == a else _OPPOSITE[relation]])
        text = f"{phrases[a]} {words} {phrases[b]}"
    if mention.background:
        text += _background_words(scene.background, rng)
    if scene.split == "train":
        text = rng.choice(("{}", "{}", "{}", "a picture of {}", "an image of {}")).format(text)
    return text if scene.style == "twemoji" else f"{text}, {STYLES[scene.style].words}"


def _noun_phrase(
    thing: Thing,
    size: str | None,
    color: str | None,
    words: str,
    rng: random.Random | None = None,
) -> str:
    """Name one thing: "a small red cat"; with ``rng``, now and then in other ways."""
    noun = getattr(thing, words) or thing.name
    if color is not None and rng is not None and rng.random() < 0.2:
        plain = _with_article(thing, " ".join(filter(None, (size, noun))))
        verb = "are" if thing.kind == "plural" else "is"
        return rng.choice((f"{plain} that {verb} {color}", f"{plain} in {color}"))
    return _with_article(thing, " ".join(filter(None, (size, color, noun))))


def _with_article(thing: Thing, phrase: str) -> str:
    if not thing.is_counted:
        return phrase
    # By sound: "an hourglass", "a unicorn", "a UFO".
    vowel = phrase.startswith("hour") or phrase[0].lower() in "aeiou"
    is_an = vowel and not phrase.startswith(("uni", "UFO"))
    return f"{'an' if is_an else 'a'} {phrase}"


def _background_words(background: Background, rng: random.Random) -> str:
    if background.kind == "ground":
        return f" {rng.choice(_GROUND_WORDS[background.names[0]])}"
    name = background_name(background)
    article = "an" if name[0] in "aeiou" else "a"
    return rng.choice(
        (
            f" on {article} {name} background",
            f" on {article} {name} background",
            f" against {article} {name} background",
            f", {name} background",
        )
    )


def _korean(scene: Scene, mention: Mention, rng: random.Random) -> str:
    phrases = [
        f"{_KOREAN_COLORS[item.color]} {all_things()[item.thing].korean}"
        if has_color
        else all_things()[item.thing].korean
        for item, has_color in zip(scene.objects, mention.colors, strict=True)
    ]
    text = phrases[0]
    if scene.kind == "count":
        counter = _KOREAN_COUNTERS.get(all_things()[scene.objects[0].thing].kind, "개")
        text = f"{text} {_KOREAN_NUMBERS[len(scene.objects)]} {counter}"
    elif mention.size:
        text = f"{_KOREAN_SIZES[scene.objects[0].size]} {text}"
    if scene.kind == "pair":
        a, b = rng.sample((0, 1), 2)
        if mention.relation is None:
            text = f"{_with_and(phrases[a])} {phrases[b]}"
        else:
            subject, relation, _ = mention.relation
            words = _KOREAN_RELATIONS[relation if subject == a else _OPPOSITE[relation]]
            space = " " if relation in DIRECTIONS else ""
            text = f"{phrases[b]}{space}{words} {phrases[a]}"
    if mention.background:
        text = f"{_background_korean(scene.background)} {text}"
    return text if scene.style == "twemoji" else f"{text}, {STYLES[scene.style].words_ko}"


def _with_and(words: str) -> str:
    # 과 follows a final consonant; Hangul syllables without one are multiples of 28.
    return f"{words}{'와' if (ord(words[-1]) - ord('가')) % 28 == 0 else '과'}"


def _background_korean(background: Background) -> str:
    if background.kind == "ground":
        return _KOREAN_GROUNDS[background.names[0]]
    if background.kind == "gradient":
        first, last = (_KOREAN_COLOR_NOUNS[name] for name in background.names)
        return f"{first}에서 {last}으로 변하는 배경의"
    return f"{_KOREAN_COLORS[background.names[0]]} 배경의"
