"""Captions to ``text_token_ids``: a byte-level BPE tokenizer trained on the captions at hand.

Byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909; over bytes as in GPT-2, Radford et al. 2019)
starts from all 256 bytes, so no text in any language is ever unknown. Captions are first brought
to Unicode NFC and lower case with single spaces ("Flag of South Korea" means "flag of south
korea"), and get a leading space, so that a first word equals the same word further on.
The only special token is ``<pad>``, id 0; a caption of nothing but pads is the null caption.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor

from dalle_mini_impl.errors import UserError, one_line
from vqvae.serialization import read_json

logger = logging.getLogger(__name__)

PAD_TOKEN = "<pad>"
PAD_TOKEN_ID = 0
MIN_VOCAB_SIZE = 257  # the pad and the 256 bytes
MAX_TOKENIZER_BYTES = 1 << 24  # of tokenizer.json: 200,000 tokens
_MAX_TEXT_LENGTH = 100_000
_MAX_SHOWN = 100  # tokens or letters of a caption in a message
_TOKENIZER_NAME, _CONFIG_NAME = "tokenizer.json", "tokenizer_config.json"


def train_text_tokenizer(captions: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer of at most ``vocab_size`` tokens on all captions.

    ``vocab_size`` counts the pad and the 256 bytes. Few captions may not fill it:
    ``get_vocab_size()`` is the true number.

    Raises:
        UserError: ``vocab_size`` below 257, or no captions.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"vocab_size is {vocab_size}, expected at least {MIN_VOCAB_SIZE}")
    texts = [_checked(caption) for caption in captions]
    if not texts:
        raise UserError("no captions to train the text tokenizer on")
    tokenizer = _untrained()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN],
        # All 256 bytes, seen or not: no prompt has an unknown token.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # What transformers adds too; it changes no token, but the fingerprint of a tokenizer.
    tokenizer.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1")
    return tokenizer


def _untrained() -> Tokenizer:
    """Return the rules by which every tokenizer here splits its text, without a vocabulary."""
    # Normal form first: one caption has one row of tokens, however it was typed.
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


class TextTokenizer:
    """Turns captions into rows of ``text_length`` token ids.

    ``tokenizer`` is one of ``train_text_tokenizer``: the pad token has id 0.
    """

    def __init__(self, tokenizer: Tokenizer, text_length: int) -> None:
        if text_length < 1:
            raise UserError(f"text_length is {text_length}, expected at least 1")
        if tokenizer.token_to_id(PAD_TOKEN) != PAD_TOKEN_ID:
            got = tokenizer.token_to_id(PAD_TOKEN)
            raise UserError(f"id of {PAD_TOKEN} is {got}, expected {PAD_TOKEN_ID}")
        self.tokenizer = tokenizer
        self.tokenizer.encode_special_tokens = True  # a prompt's "<pad>" is plain text
        self.text_length = text_length
        self._has_warned = False

    @classmethod
    def learn(
        cls, captions: Iterable[str], *, vocab_size: int, text_length: int
    ) -> "TextTokenizer":
        """Train a tokenizer on captions and wrap it."""
        return cls(train_text_tokenizer(captions, vocab_size=vocab_size), text_length)

    @property
    def vocab_size(self) -> int:
        """Number of different token ids."""
        return self.tokenizer.get_vocab_size()

    def encode(
        self, captions: Sequence[str], *, log_truncated: bool = False
    ) -> Int64[Tensor, "batch text_length"]:
        """Encode captions, padded on the right; what is longer than ``text_length`` is cut.

        Special tokens in a caption ("<pad>") are plain text. With ``log_truncated``, for data sets,
        it logs how many captions were cut.

        Raises:
            UserError: An empty caption, or one that is not valid Unicode.
        """
        return self.pad(self.tokenize(captions), log_truncated=log_truncated)

    def tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        """Encode captions to rows of their own lengths; raises UserError as ``encode`` does."""
        # A string is a sequence of strings too: its letters would become captions.
        if isinstance(captions, str):
            raise ValueError(f"captions is the string {captions!r}, expected a list of strings")
        texts = [_checked(caption) for caption in captions]
        # Fast: without offsets, which nothing here needs.
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def fragment_ids(self, captions: Iterable[str]) -> Int64[Tensor, " fragments"]:
        """List the ids that are no whole word of these captions: what unknown words become."""
        words = sorted({word for caption in captions for word in caption.split()})
        whole = {row[0] for row in self.tokenize(words) if len(row) == 1}
        ids = range(PAD_TOKEN_ID + 1, self.vocab_size)
        return torch.tensor([number for number in ids if number not in whole])

    def pad(
        self, rows: Sequence[Sequence[int]], *, log_truncated: bool = False
    ) -> Int64[Tensor, "batch text_length"]:
        """Bring rows of token ids to ``text_length``: cut them or pad them on the right."""
        text_token_ids = torch.full((len(rows), self.text_length), PAD_TOKEN_ID)
        truncated = [row for row in rows if len(row) > self.text_length]
        for index, row in enumerate(rows):
            kept = row[: self.text_length]
            text_token_ids[index, : len(kept)] = torch.tensor(kept)
        if truncated and not self._has_warned:
            # Once: a long prompt in a loop must not fill the log.
            self._has_warned = True
            logger.warning(
                "caption of %d tokens is truncated to text_length %d (shown once): %r",
                len(truncated[0]),
                self.text_length,
                self.tokenizer.decode(truncated[0][:_MAX_SHOWN])[:_MAX_SHOWN].strip(),
            )
        if truncated and log_truncated:
            logger.info(
                f"{len(truncated)} of {len(rows)} captions were longer than {self.text_length} "
                "tokens and were cut"
            )
        return text_token_ids

    def decode(self, text_token_ids: Int64[Tensor, "batch text_length"]) -> list[str]:
        """Turn token ids back into text, in lower case with single spaces.

        An incomplete UTF-8 character at the end is dropped.
        """
        texts = self.tokenizer.decode_batch(text_token_ids.tolist(), skip_special_tokens=True)
        return [" ".join(text.rstrip("\ufffd").split()) for text in texts]

    def null_text_token_ids(self) -> Int64[Tensor, " text_length"]:
        """Return the null caption of guidance and caption dropout: nothing but pads."""
        return torch.full((self.text_length,), PAD_TOKEN_ID)

    def fingerprint(self) -> str:
        """Hash the vocabulary: equal fingerprints mean equal tokens for equal captions."""
        # The whole file and not its vocabulary alone: rules of splitting decide the tokens as well.
        rules = self.tokenizer.to_str()
        return hashlib.sha256(f"{self.text_length} {rules}".encode()).hexdigest()[:16]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder in the format of transformers; ``model_max_length`` is ``text_length``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(str(folder / _TOKENIZER_NAME))
        fields = {
            "model_max_length": self.text_length,
            "pad_token": PAD_TOKEN,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        text = json.dumps(fields, indent=2)
        (folder / _CONFIG_NAME).write_text(f"{text}\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "TextTokenizer":
        """Read a folder that ``save_pretrained`` wrote, and nothing else in it.

        Raises UserError for a tokenizer with other rules: an untrusted one may hold a regular
        expression that takes forever.
        """
        path = Path(folder)
        if not (path / _TOKENIZER_NAME).is_file():
            raise UserError(f"no text tokenizer in {path}: {_TOKENIZER_NAME} is missing")
        try:
            tokenizer = _read_tokenizer(path / _TOKENIZER_NAME)
            length = read_json(path / _CONFIG_NAME).get("model_max_length")
        except Exception as error:  # the Rust side raises bare Exception for a damaged file
            reason = one_line(error)[:300]
            raise UserError(f"cannot read the text tokenizer in {path}: {reason}") from None
        if type(length) is not int or length > _MAX_TEXT_LENGTH:
            raise UserError(
                f"model_max_length (the text length) of the tokenizer in {path} is {length!r:.80}, "
                f"expected a whole number up to {_MAX_TEXT_LENGTH}"
            )
        return cls(tokenizer, length)


def _read_tokenizer(path: Path) -> Tokenizer:
    """Parse a tokenizer's file once its patterns are known to be ours."""
    # The limit holds while reading: a file may grow after its size was asked.
    with path.open("rb") as file:
        content = file.read(MAX_TOKENIZER_BYTES + 1)
    if len(content) > MAX_TOKENIZER_BYTES:
        raise ValueError(f"{path.name} is larger than {MAX_TOKENIZER_BYTES} bytes")
    text = content.decode("utf-8")
    parsed, ours = json.loads(text), json.loads(_untrained().to_str())
    # 1. before the library reads it: an id of a billion takes it a minute
    ids, added = parsed["model"]["vocab"].values(), parsed["added_tokens"]
    # `type(each) is not int`, since True and 1.0 equal 1.
    if set(ids) != set(range(len(ids))) or any(type(each) is not int for each in ids):
        raise ValueError("its token ids are not 0, 1, 2, ...")
    if [(token["id"], token["content"]) for token in added] != [(PAD_TOKEN_ID, PAD_TOKEN)]:
        raise ValueError(f"its special tokens are not {PAD_TOKEN} alone")
    if not set(_patterns(parsed)) <= set(_patterns(ours)):
        raise ValueError("it splits text by other patterns than those of this project")
    # 2. as the library reads it
    tokenizer = Tokenizer.from_str(text)
    # Compared as the library writes them: fields that a file leaves out get their defaults.
    if _rules(json.loads(tokenizer.to_str())) != _rules(ours):
        raise ValueError("it splits text by other rules than those of this project")
    return tokenizer


def _patterns(value: Any) -> list[Any]:
    """Collect the regular expressions of a parsed tokenizer file."""
    if isinstance(value, list):
        return [pattern for each in value for pattern in _patterns(each)]
    if not isinstance(value, dict):
        return []
    # Tokens may spell anything, "Regex" too; they are no patterns.
    parts = [each for key, each in value.items() if key != "vocab"]
    return _patterns(parts) + ([str(value["Regex"])] if "Regex" in value else [])


def _rules(parsed: dict[str, Any]) -> dict[str, Any]:
    """Return what decides how text is split, but for the vocabulary and the padding token."""
    model = {key: each for key, each in parsed["model"].items() if key not in ("vocab", "merges")}
    parts = ("normalizer", "pre_tokenizer", "decoder", "truncation", "padding")
    return {"model": model, **{name: parsed[name] for name in parts}}


def _checked(caption: str) -> str:
    if not caption.strip():
        raise UserError(f"caption: got {caption[:20]!r}, expected some text")
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"caption: got {caption[:100]!r}, expected valid Unicode text") from error
    return caption
