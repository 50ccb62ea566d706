"""The caption tokenizer: no unknown text, one meaning per caption, strict inputs."""

import functools
import json
import logging
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_mini_impl.data.text_tokenizer import PAD_TOKEN_ID, TextTokenizer, train_text_tokenizer
from dalle_mini_impl.errors import UserError
from tests.reference.log_lines import log_lines

CAPTIONS = ["a red square", "a blue square", "flag of South Korea", "flag of Norway"] * 3
CAPTIONS += ["빨간 사각형", "대한민국 국기"] * 3


@pytest.fixture(scope="module")
def encoder() -> TextTokenizer:
    return TextTokenizer(train_text_tokenizer(CAPTIONS, vocab_size=300), text_length=24)


@functools.cache
def bytes_only() -> Any:
    return train_text_tokenizer(["a"], vocab_size=257)


def rows(encoder: TextTokenizer, *captions: str) -> list[list[int]]:
    return encoder.encode(captions).tolist()


def decode(encoder: TextTokenizer, row: list[int]) -> str:
    return str(encoder.tokenizer.decode(row, skip_special_tokens=True))


def test_fragments_are_what_unknown_words_become() -> None:
    encoder = TextTokenizer(train_text_tokenizer(CAPTIONS, vocab_size=400), text_length=24)
    fragments = set(encoder.fragment_ids(CAPTIONS).tolist())
    whole = [row[0] for row in encoder.tokenize(["red", "square", "flag", "국기", "a"])]
    assert fragments.isdisjoint([*whole, PAD_TOKEN_ID])
    # What is left of the vocabulary, single bytes of other alphabets too.
    assert len(fragments) == encoder.vocab_size - 1 - len(set(" ".join(CAPTIONS).split()))
    for word in ("zebra", "Норвегия", "삼각형"):
        assert fragments.issuperset(encoder.tokenize([word])[0]), word


def test_case_spaces_and_unicode_form_do_not_matter(encoder: TextTokenizer) -> None:
    decomposed = unicodedata.normalize("NFD", "대한민국 국기")
    assert decomposed != "대한민국 국기"
    spaced = ("  Flag of  SOUTH\tKorea\n", "flag\u3000of\xa0south korea")
    first, *others = rows(encoder, "flag of south korea", *spaced)
    assert all(other == first for other in others)
    composed, from_decomposed = rows(encoder, "대한민국 국기", decomposed)
    assert composed == from_decomposed


def test_a_first_word_equals_the_same_word_inside(encoder: TextTokenizer) -> None:
    first, inside = rows(encoder, "square", "red square")
    word = [token for token in first if token]
    tokens = [token for token in inside if token]
    assert tokens[-len(word) :] == word


def test_rows_are_right_padded_with_zero(encoder: TextTokenizer) -> None:
    text_token_ids = encoder.encode(["a red square", "flag"])
    assert text_token_ids.shape == (2, 24)
    assert text_token_ids.dtype == torch.int64
    for row in text_token_ids:
        length = int((row != 0).sum())
        assert 0 < length < 24
        assert (row[:length] != 0).all()
        assert (row[length:] == 0).all()
    assert encoder.encode([]).shape == (0, 24)


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
def test_any_text_decodes_back_to_its_normal_form(text: str) -> None:
    tokenizer = bytes_only()
    encoder = TextTokenizer(tokenizer, text_length=1000)
    if not text.strip():
        with pytest.raises(UserError, match="empty"):
            encoder.encode([text])
        return
    row = rows(encoder, text)[0]
    expected = tokenizer.normalizer.normalize_str(text)
    assert decode(encoder, row).removeprefix(" ") == expected.removeprefix(" ")
    assert max(row) < encoder.vocab_size


def test_training_does_not_depend_on_caption_order() -> None:
    first = train_text_tokenizer(CAPTIONS, vocab_size=300)
    second = train_text_tokenizer(CAPTIONS[::-1], vocab_size=300)
    assert first.get_vocab() == second.get_vocab()
    assert first.get_vocab_size() <= 300
    assert first.token_to_id("<pad>") == 0


def test_merges_shorten_the_training_captions(encoder: TextTokenizer) -> None:
    long = TextTokenizer(bytes_only(), text_length=64)
    short, unmerged = rows(encoder, "flag of norway")[0], rows(long, "flag of norway")[0]
    assert sum(token > 0 for token in short) < sum(token > 0 for token in unmerged) == 15


def test_special_tokens_in_captions_are_plain_text(encoder: TextTokenizer) -> None:
    row = rows(encoder, "<pad> red <pad>")[0]
    length = sum(token != 0 for token in row)
    assert 0 not in row[:length]
    assert decode(encoder, row).strip() == "<pad> red <pad>"


def test_null_caption_is_all_pads(encoder: TextTokenizer) -> None:
    assert torch.equal(encoder.null_text_token_ids(), torch.zeros(24, dtype=torch.int64))


def test_rows_become_text_again(encoder: TextTokenizer) -> None:
    texts = ["a red  Square", "대한민국 국기"]
    cut = encoder.encode(texts)
    assert encoder.decode(cut) == ["a red square", "대한민국 국기"]
    flag = encoder.encode(["빨갱"])  # a letter of three bytes that no merge knows as a whole
    flag[0, int((flag != 0).sum()) - 1] = 0
    assert encoder.decode(flag) == ["빨"]
    assert encoder.decode(encoder.null_text_token_ids()[None]) == [""]


def test_long_captions_are_cut_counted_and_warned_about_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    encoder = TextTokenizer(bytes_only(), text_length=8)
    with caplog.at_level(logging.WARNING):
        encoder.encode(["x" * 7, "x" * 8])
        encoder.encode(["y" * 100_000, "z"])
    assert len(caplog.records) == 1
    assert len(caplog.text) < 400
    with log_lines() as lines:
        encoder.encode(["x" * 7, "x" * 8, "y" * 100_000, "z"], log_truncated=True)
    assert lines == ["2 of 4 captions were longer than 8 tokens and were cut"]
    cut, whole = rows(encoder, "x" * 8, "x" * 7)
    assert cut == whole


@pytest.mark.parametrize("caption", ["", " ", "\n\t\xa0"])
def test_empty_captions_are_refused(encoder: TextTokenizer, caption: str) -> None:
    with pytest.raises(UserError, match=r"caption: got .* expected some text"):
        encoder.encode(["a red square", caption])


def test_other_bad_inputs_are_refused(encoder: TextTokenizer) -> None:
    with pytest.raises(UserError, match="expected valid Unicode"):
        encoder.encode(["\ud800 red"])
    with pytest.raises(ValueError, match="expected a list of strings"):
        encoder.encode("a red square")
    with pytest.raises(UserError, match="vocab_size is 256, expected at least 257"):
        train_text_tokenizer(CAPTIONS, vocab_size=256)
    with pytest.raises(UserError, match="no captions"):
        train_text_tokenizer([], vocab_size=300)
    with pytest.raises(UserError, match="text_length is 0"):
        TextTokenizer(encoder.tokenizer, 0)


def test_save_and_load_give_the_same_encoder(encoder: TextTokenizer, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path / "text_tokenizer")
    loaded = TextTokenizer.from_pretrained(tmp_path / "text_tokenizer")
    assert (loaded.text_length, loaded.vocab_size) == (24, encoder.vocab_size)
    captions = ["Flag of <pad> Norway", "빨간 사각형", "never seen: \u00e9\U0001f600"]
    assert torch.equal(loaded.encode(captions), encoder.encode(captions))


def test_loading_a_broken_folder_names_it(encoder: TextTokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no text tokenizer in .*missing"):
        TextTokenizer.from_pretrained(tmp_path / "missing")
    encoder.save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    settings_ = json.loads(config.read_text())
    del settings_["model_max_length"]
    config.write_text(json.dumps(settings_))
    with pytest.raises(UserError, match="model_max_length"):
        TextTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    with pytest.raises(UserError, match="cannot read the text tokenizer"):
        TextTokenizer.from_pretrained(tmp_path)
