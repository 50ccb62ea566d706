"""BPE dropout: the same caption in other tokens, so that no single way of splitting is learned.

While a word's letters are merged, each merge is left out with some probability, so that shorter
tokens occur in places where the usual encoding never has them. The dropout of the library
``tokenizers`` cannot be seeded. This one is a function of the caption and of a variant's number, so
that a repeated or resumed run learns the same tokens.

Source: Provilkov et al. 2020, arXiv:1910.13267, algorithm 1; DALL-E (Ramesh et al. 2021,
arXiv:2102.12092, appendix B.2) used it at 10 %. There a caption is tokenized
again each time it is read; here it has a fixed number of variants.
"""

import itertools
import json
import random
from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Int64
from tokenizers import Tokenizer
from torch import Tensor

from dalle_mini_impl.data.text_tokenizer import TextTokenizer

NUM_VARIANTS = 8  # of each caption, the usual encoding among them


class MergeRules(NamedTuple):
    """What byte-level BPE has learned."""

    ids: dict[str, int]
    ranks: dict[tuple[str, str], int]  # of merges; the lowest is merged first


def encode_variants(
    text_tokenizer: TextTokenizer, texts: Sequence[str], *, dropout: float
) -> Int64[Tensor, "rows text_length"]:
    """Encode every caption in ``NUM_VARIANTS`` ways, one after the other; the first is the usual.

    Raises UserError as ``TextTokenizer.encode`` does, and logs how many rows were cut.
    """
    usual = text_tokenizer.tokenize(texts)
    rules = merge_rules(text_tokenizer.tokenizer)
    rows = []
    for text, tokens in zip(texts, usual, strict=True):
        words = words_of(text_tokenizer.tokenizer, text)
        rows.append(tokens)
        # The seed names variant and caption alone: what else is in the data set changes nothing.
        rows += [
            split_with_dropout(words, rules, dropout=dropout, seed=f"{variant} {text}")
            for variant in range(1, NUM_VARIANTS)
        ]
    return text_tokenizer.pad(rows, log_truncated=True)


def words_of(tokenizer: Tokenizer, text: str) -> list[str]:
    """Normalize a caption and pre-tokenize it into words."""
    # Split here, since the library's own dropout takes no seed.
    normal = tokenizer.normalizer.normalize_str(text)
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)]


def split_with_dropout(
    words: Sequence[str], rules: MergeRules, *, dropout: float, seed: str
) -> list[int]:
    """Encode one caption, cut into words by ``words_of``; without dropout as the library does."""
    generator = random.Random(seed)
    return [
        rules.ids[token]
        for word in words
        for token in _merged(word, rules.ranks, dropout, generator)
    ]


def _merged(
    word: str, ranks: dict[tuple[str, str], int], dropout: float, generator: random.Random
) -> list[str]:
    tokens = list(word)
    while True:
        # Drop each possible merge independently; apply the remaining one of lowest rank.
        possible = (
            (ranks[pair], place)
            for place, pair in enumerate(itertools.pairwise(tokens))
            if pair in ranks and generator.random() >= dropout
        )
        _, place = min(possible, default=(0, None))
        if place is None:
            return tokens
        # One merge per round: every merge changes which pairs are possible.
        tokens[place : place + 2] = [tokens[place] + tokens[place + 1]]


def merge_rules(tokenizer: Tokenizer) -> MergeRules:
    """Read a tokenizer's vocabulary and merges, once for many captions."""
    model = json.loads(tokenizer.to_str())["model"]
    ranks = {(left, right): rank for rank, (left, right) in enumerate(model["merges"])}
    return MergeRules(model["vocab"], ranks)
