"""Pairs of texts: read strictly, and held out without leaks."""

import re
from pathlib import Path

import pytest

from dalle_mini_impl.builtin_datasets.translation_pairs import (
    TextPairs,
    load_text_pairs,
    nearest_targets,
)
from dalle_mini_impl.errors import UserError
from tests.reference import tiny


@pytest.fixture(scope="module")
def names() -> TextPairs:
    return load_text_pairs("emoji", held_out_percent=10)


def test_names_of_emoji_are_real_pairs(names: TextPairs) -> None:
    known = {(pair.source, pair.target) for pair in (*names.train, *names.held_out)}
    assert {("red heart", "빨간색 하트"), ("pizza", "피자")} <= known
    assert len(names.train) > 4000
    assert 200 < len(names.held_out) < 800
    assert 0.2 < sum(pair.is_plain for pair in names.held_out) / len(names.held_out) < 0.8


TONES = re.compile(r"(medium-light|medium-dark|light|dark|medium) skin tone")
PEOPLE = re.compile(r"\b(man|woman|men|women|person|people|boy|girl)\b")


def test_no_name_of_a_new_family_is_a_variant_of_a_training_name(names: TextPairs) -> None:
    def bare(text: str) -> str:
        return " ".join(PEOPLE.sub(" ", TONES.sub(" ", text.lower())).split())

    is_new = names.is_new_family()
    new = [pair for pair, new in zip(names.held_out, is_new, strict=True) if new]
    assert len(new) > 200
    assert not {pair.family for pair in names.train} & {pair.family for pair in new}
    sources = {bare(pair.source) for pair in names.train}
    assert not [pair for pair in new if bare(pair.source) in sources]


def test_new_combinations_are_of_known_words_and_were_never_seen(names: TextPairs) -> None:
    is_new = names.is_new_family()
    combinations = [pair for pair, new in zip(names.held_out, is_new, strict=True) if not new]
    assert len(combinations) > 100
    assert not any(pair.is_plain for pair in combinations)
    families = {pair.family for pair in names.train}
    assert all(pair.family in families for pair in combinations)
    targets = {pair.target for pair in names.train}  # under any English name
    assert not [pair for pair in names.held_out if pair.target in targets]
    words = {word for pair in names.train for word in pair.source.split()}
    known = [pair for pair in combinations if set(pair.source.split()) <= words]
    assert len(known) > 0.95 * len(combinations)


def test_variants_by_hexcode_are_one_family(names: TextPairs) -> None:
    families = {pair.source: pair.family for pair in (*names.train, *names.held_out)}
    assert families["mermaid"] == families["merman"]  # by structure: no word in common
    assert families["woman firefighter dark skin tone"] == families["firefighter"]
    assert families["pizza"] != families["firefighter"]


def test_large_families_weigh_less(names: TextPairs) -> None:
    weights = dict(zip((pair.source for pair in names.train), names.family_weights(), strict=True))
    assert max(weights.values()) == 1.0
    assert min(weights.values()) < 0.2


def test_a_table_is_split_by_its_texts(tmp_path: Path) -> None:
    path = tiny.write_text_pairs(tmp_path / "pairs.tsv")
    pairs = load_text_pairs(str(path), held_out_percent=20)
    assert len(pairs.train) + len(pairs.held_out) == 36
    assert 0 < len(pairs.held_out) < 18
    again = load_text_pairs(str(path), held_out_percent=20)
    assert again == pairs
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line.upper() if index else line for index, line in enumerate(lines)))
    path.write_text(path.read_text() + "\n" + "\n".join(lines))  # the same texts once more
    double = load_text_pairs(str(path), held_out_percent=20)
    sources = [{pair.source.lower() for pair in part} for part in (double.train, double.held_out)]
    assert not sources[0] & sources[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one\ttwo\nthree", "line 2: got 'three', expected a source, a tab and a target"),
        ("one\t ", "line 1: got 'one"),
        ("a\tb\tc", "line 1: got"),
        ("one\ttwo", "pairs to learn and"),
        (None, r"data.source: cannot read .*/pairs.tsv"),
    ],
)
def test_a_bad_or_missing_table_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "pairs.tsv").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_text_pairs(str(tmp_path / "pairs.tsv"), held_out_percent=10)
    assert str(caught.value).startswith("data.source")


def test_nearest_source_predictions(names: TextPairs) -> None:
    known = [pair for pair in names.train if pair.source in ("red heart", "pizza", "cat face")]
    predictions = nearest_targets(["blue heart", "dog face", "pizzas", "??"], known)
    assert predictions[:3] == ["빨간색 하트", "고양이 얼굴", "피자"]
    assert predictions[3] in {pair.target for pair in known}
