"""Captions to `text_token_ids`: a byte-level BPE tokenizer trained on the captions at hand.

Byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909; over bytes as in GPT-2, Radford et al. 2019)
starts from all 256 bytes, so no text in any language is ever unknown. Captions are first brought
to Unicode NFC and lower case with single spaces ("Flag of South Korea" means "flag of south
korea"), and get a leading space, so that a first word equals the same word further on.
The only special token is `<pad>`, id 0; a caption of nothing but pads is the null caption.
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

from dalle_mini_impl.errors import UserError

logger = logging.getLogger(__name__)

PAD_TOKEN = "<pad>"
PAD_TOKEN_ID = 0
MIN_VOCAB_SIZE = 257  # the pad and the 256 bytes
MAX_TOKENIZER_BYTES = 1 << 24  # of tokenizer.json: 200,000 tokens
MAX_CONFIG_BYTES = 1 << 20
_MAX_TEXT_LENGTH = 100_000
_TOKENIZER_NAME, _CONFIG_NAME = "tokenizer.json", "tokenizer_config.json"


def train_text_tokenizer(captions: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE tokenizer.

    Args:
        captions: All training captions, paraphrases and languages included.
        vocab_size: Largest number of tokens, `<pad>` and the 256 bytes among them. Few captions
            may not fill it; `len(tokenizer)` is the true number.

    Returns:
        A tokenizer that never yields an unknown token.

    Raises:
        UserError: `vocab_size` below 257, or no captions.
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
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # What transformers adds; nothing comes of it, but hashes of older tokenizers stay true.
    tokenizer.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1")
    return tokenizer


def _untrained() -> Tokenizer:
    """Return the rules by which every tokenizer here splits its text, without a vocabulary."""
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
    """Turns captions into rows of `text_length` token ids."""

    def __init__(self, tokenizer: Tokenizer, text_length: int) -> None:
        """Wraps a tokenizer.

        Args:
            tokenizer: As `train_text_tokenizer` makes it.
            text_length: Tokens per caption, padding included.

        Raises:
            UserError: `text_length` below 1, or the pad token is not id 0.
        """
        if text_length < 1:
            raise UserError(f"text_length is {text_length}, expected at least 1")
        if tokenizer.token_to_id(PAD_TOKEN) != PAD_TOKEN_ID:
            got = tokenizer.token_to_id(PAD_TOKEN)
            raise UserError(f"id of {PAD_TOKEN} is {got}, expected {PAD_TOKEN_ID}")
        self.tokenizer = tokenizer
        self.tokenizer.encode_special_tokens = True  # a prompt's "<pad>" is plain text
        self.text_length = text_length
        self.num_encoded = 0
        self.num_truncated = 0

    @classmethod
    def learn(
        cls, captions: Iterable[str], *, vocab_size: int, text_length: int
    ) -> "TextTokenizer":
        """Trains a tokenizer and wraps it.

        Args:
            captions: As `train_text_tokenizer` takes them.
            vocab_size: As `train_text_tokenizer` takes it.
            text_length: Tokens per caption, padding included.

        Returns:
            The encoder.
        """
        return cls(train_text_tokenizer(captions, vocab_size=vocab_size), text_length)

    @property
    def vocab_size(self) -> int:
        """Number of different token ids."""
        return self.tokenizer.get_vocab_size()

    def encode(self, captions: Sequence[str]) -> Int64[Tensor, "batch text_length"]:
        """Encodes captions, right-padded; what is longer than `text_length` is cut and counted.

        Args:
            captions: One text per row. Special tokens in them ("<pad>") are plain text.

        Returns:
            Token ids.

        Raises:
            UserError: An empty caption, or one that is not valid Unicode.
            ValueError: A single string instead of a sequence of strings.
        """
        if isinstance(captions, str):
            raise ValueError(f"captions is the string {captions!r}, expected a list of strings")
        if not captions:
            return self.pad([], [])
        texts = [_checked(caption) for caption in captions]
        rows = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return self.pad(captions, [encoding.ids for encoding in rows])

    def pad(
        self, captions: Sequence[str], rows: Sequence[Sequence[int]]
    ) -> Int64[Tensor, "batch text_length"]:
        """Brings encoded captions to one length; what is longer is cut and counted.

        Args:
            captions: Their texts, for the message.
            rows: Their token ids.

        Returns:
            Token ids, padded on the right.
        """
        text_token_ids = torch.full((len(captions), self.text_length), PAD_TOKEN_ID)
        for index, row in enumerate(rows):
            if len(row) > self.text_length:
                self._count_truncated(captions[index], len(row))
            kept = row[: self.text_length]
            text_token_ids[index, : len(kept)] = torch.tensor(kept)
        self.num_encoded += len(captions)
        return text_token_ids

    def decode(self, text_token_ids: Int64[Tensor, "batch text_length"]) -> list[str]:
        """Turns token ids back into text.

        Args:
            text_token_ids: As `encode` makes them, or generated ones.

        Returns:
            One text per row, in lower case with single spaces; a letter that was cut in the middle
            of its bytes at the end is left out.
        """
        texts = self.tokenizer.decode_batch(text_token_ids.tolist(), skip_special_tokens=True)
        return [" ".join(text.rstrip("\ufffd").split()) for text in texts]

    def _count_truncated(self, caption: str, num_tokens: int) -> None:
        if not self.num_truncated:
            logger.warning(
                "caption of %d tokens is cut to text_length %d (further ones are only counted): %r",
                num_tokens,
                self.text_length,
                caption[:100],
            )
        self.num_truncated += 1

    def truncation_report(self) -> str:
        """Says in one line how many captions have been cut so far."""
        return (
            f"{self.num_truncated} of {self.num_encoded} captions were longer than "
            f"{self.text_length} tokens and were cut"
        )

    def null_text_token_ids(self) -> Int64[Tensor, " text_length"]:
        """Returns the null caption for guidance and caption dropout: nothing but pads."""
        return torch.full((self.text_length,), PAD_TOKEN_ID)

    def fingerprint(self) -> str:
        """Hash the vocabulary: equal fingerprints mean equal tokens for equal captions."""
        rules = self.tokenizer.to_str()
        return hashlib.sha256(f"{self.text_length} {rules}".encode()).hexdigest()[:16]

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a folder in the format of transformers; `model_max_length` is `text_length`.

        Args:
            folder: Created if missing.
        """
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
        """Reads a folder that `save_pretrained` wrote, and nothing else in it.

        A tokenizer by other rules is refused: a stranger's may hold a pattern that takes forever.

        Args:
            folder: The tokenizer's folder.

        Returns:
            An encoder with the counters at zero.

        Raises:
            UserError: The folder holds no tokenizer, another kind of one, or one without
                `text_length`.
        """
        path = Path(folder)
        if not (path / _TOKENIZER_NAME).is_file():
            raise UserError(f"no text tokenizer in {path}: {_TOKENIZER_NAME} is missing")
        try:
            tokenizer = _read_tokenizer(path / _TOKENIZER_NAME)
            config = json.loads(_read_text(path / _CONFIG_NAME, max_bytes=MAX_CONFIG_BYTES))
            length = config.get("model_max_length")
        except Exception as error:  # the Rust side raises bare Exception for a damaged file
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"cannot read the text tokenizer in {path}: {reason}") from None
        if type(length) is not int or length > _MAX_TEXT_LENGTH:
            raise UserError(
                f"model_max_length (the text length) of the tokenizer in {path} is {length!r:.80}, "
                f"expected a whole number up to {_MAX_TEXT_LENGTH}"
            )
        return cls(tokenizer, length)


def _read_tokenizer(path: Path) -> Tokenizer:
    """Parse a tokenizer's file once its patterns are known to be ours."""
    text = _read_text(path, max_bytes=MAX_TOKENIZER_BYTES)
    parsed, ours = json.loads(text), json.loads(_untrained().to_str())
    # Before the library reads it: an id of a billion takes it a minute.
    ids, added = parsed["model"]["vocab"].values(), parsed["added_tokens"]
    if set(ids) != set(range(len(ids))) or any(type(each) is not int for each in ids):
        raise ValueError("its token ids are not 0, 1, 2, ...")
    if [(token["id"], token["content"]) for token in added] != [(PAD_TOKEN_ID, PAD_TOKEN)]:
        raise ValueError(f"its special tokens are not {PAD_TOKEN} alone")
    if not set(_patterns(parsed)) <= set(_patterns(ours)):
        raise ValueError("it splits text by other patterns than those of this project")
    tokenizer = Tokenizer.from_str(text)
    if _rules(json.loads(tokenizer.to_str())) != _rules(ours):
        raise ValueError("it splits text by other rules than those of this project")
    return tokenizer


def _read_text(path: Path, *, max_bytes: int) -> str:
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"{path.name} is larger than {max_bytes} bytes")
    return content.decode("utf-8")


def _patterns(value: Any) -> list[Any]:
    """Collect the regular expressions of a parsed tokenizer file."""
    if isinstance(value, list):
        return [pattern for each in value for pattern in _patterns(each)]
    if not isinstance(value, dict):
        return []
    inner = [
        pattern for key, each in value.items() if key != "vocab" for pattern in _patterns(each)
    ]
    return [*inner, *([str(value["Regex"])] if "Regex" in value else [])]


def _rules(parsed: dict[str, Any]) -> dict[str, Any]:
    """Return what decides how text is split, but for the vocabulary and the padding token."""
    model = {key: each for key, each in parsed["model"].items() if key not in ("vocab", "merges")}
    parts = ("normalizer", "pre_tokenizer", "decoder", "truncation", "padding")
    return {"model": model, **{name: parsed[name] for name in parts}}


def _checked(caption: str) -> str:
    if not caption.strip():
        raise UserError(f"caption is empty ({caption[:20]!r}), expected some text")
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"caption {caption[:100]!r} is not valid Unicode text") from error
    return caption
