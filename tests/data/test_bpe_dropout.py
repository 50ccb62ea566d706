"""BPE dropout: deterministic, the same text, and the usual encoding without dropout."""

import random

import pytest
import torch

from dalle_mini_impl.data.bpe_dropout import (
    NUM_VARIANTS,
    encode_variants,
    merge_rules,
    split_with_dropout,
    words_of,
)
from dalle_mini_impl.data.text_tokenizer import TextTokenizer, train_text_tokenizer
from dalle_mini_impl.errors import UserError
from tests.reference.log_lines import log_lines

CAPTIONS = [
    "a red square on a blue square",
    "Flag of  South Korea",
    "빨간 사각형 두 개",
    "it's 12 o'clock <pad>",
    "🚀 rocket",
]


@pytest.fixture(scope="module")
def text_tokenizer() -> TextTokenizer:
    return TextTokenizer(train_text_tokenizer(CAPTIONS * 3, vocab_size=340), text_length=90)


def split(text_tokenizer: TextTokenizer, text: str, dropout: float, seed: str = "1") -> list[int]:
    rules = merge_rules(text_tokenizer.tokenizer)
    words = words_of(text_tokenizer.tokenizer, text)
    return split_with_dropout(words, rules, dropout=dropout, seed=seed)


def tokens(text_tokenizer: TextTokenizer, text: str) -> list[int]:
    return [token for token in text_tokenizer.encode([text])[0].tolist() if token]


@pytest.mark.parametrize("text", [*CAPTIONS, "words that were never seen: 사과", "é" * 20])
def test_without_dropout_it_is_the_usual_encoding(text_tokenizer: TextTokenizer, text: str) -> None:
    assert split(text_tokenizer, text, 0.0) == tokens(text_tokenizer, text)


@pytest.mark.parametrize("text", CAPTIONS)
def test_dropping_everything_leaves_bytes(text_tokenizer: TextTokenizer, text: str) -> None:
    normal = " ".join(text.lower().split())
    assert len(split(text_tokenizer, text, 1.0)) == len(f" {normal}".encode())


def test_variants_decode_to_the_same_text(text_tokenizer: TextTokenizer) -> None:
    rows = encode_variants(text_tokenizer, CAPTIONS, dropout=0.3)
    table = rows.unflatten(0, (len(CAPTIONS), NUM_VARIANTS))
    assert torch.equal(table[:, 0], text_tokenizer.encode(CAPTIONS))
    for caption, variants in zip(CAPTIONS, table, strict=True):
        assert set(text_tokenizer.decode(variants)) == {" ".join(caption.lower().split())}
        assert len(variants.unique(dim=0)) > 3


def test_a_variant_depends_on_its_caption_and_number_alone(text_tokenizer: TextTokenizer) -> None:
    together = encode_variants(text_tokenizer, CAPTIONS, dropout=0.3)
    torch.manual_seed(3)
    alone = encode_variants(text_tokenizer, CAPTIONS[1:2], dropout=0.3)
    assert torch.equal(together[NUM_VARIANTS : 2 * NUM_VARIANTS], alone)


def test_merges_are_left_out_as_often_as_told(text_tokenizer: TextTokenizer) -> None:
    """A word of two letters that are one token: split in a fraction of ``dropout`` of all."""
    encoder = TextTokenizer(train_text_tokenizer(["ab"], vocab_size=258), text_length=8)
    assert len(tokens(encoder, "ab")) == 2  # the space, and "ab"
    counts = [len(split(encoder, "ab", 0.1, seed=str(number))) for number in range(2000)]
    assert set(counts) == {2, 3}
    assert counts.count(3) / 2000 == pytest.approx(0.1, abs=0.02)  # three standard errors


def test_cut_variants_are_counted(text_tokenizer: TextTokenizer) -> None:
    text_length = len(tokens(text_tokenizer, CAPTIONS[0]))
    short = TextTokenizer(text_tokenizer.tokenizer, text_length)
    with log_lines() as lines:
        encode_variants(short, CAPTIONS[:1], dropout=0.9)
    assert f"{NUM_VARIANTS - 1} of {NUM_VARIANTS} captions were longer" in lines[-1]


def test_an_empty_caption_is_refused(text_tokenizer: TextTokenizer) -> None:
    with pytest.raises(UserError, match=r"caption: got .* expected some text"):
        encode_variants(text_tokenizer, [" "], dropout=0.1)


def test_the_most_frequent_merge_goes_first() -> None:
    """Two letters in random order: most merges overlap, so that their order decides."""
    generator = random.Random(0)
    words = ["".join(generator.choices("ab", k=12)) for _ in range(200)]
    encoder = TextTokenizer(train_text_tokenizer(words, vocab_size=300), text_length=20)
    for word in words[:50]:
        assert split(encoder, word, 0.0) == tokens(encoder, word)
