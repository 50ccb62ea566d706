"""Captions to `text_token_ids`: a byte-level BPE tokenizer trained on the captions at hand.

Byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909; over bytes as in GPT-2, Radford et al. 2019)
starts from all 256 bytes, so no text in any language is ever unknown. Captions are first brought
to Unicode NFC and lower case with single spaces ("Flag of South Korea" means "flag of south
korea"), and get a leading space, so that a first word equals the same word further on.
The only special token is `<pad>`, id 0; a caption of nothing but pads is the null caption.
"""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int64
from torch import Tensor

from dalle_mini_impl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

PAD_TOKEN = "<pad>"
PAD_TOKEN_ID = 0
MIN_VOCAB_SIZE = 257  # the pad and the 256 bytes
_MAX_TEXT_LENGTH = 100_000  # transformers gives about 1e30 where no length was stored


def train_text_tokenizer(captions: Iterable[str], *, vocab_size: int) -> "PreTrainedTokenizerFast":
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
    # Imported here: transformers takes seconds, and reading captions does not need it.
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"vocab_size is {vocab_size}, wanted at least {MIN_VOCAB_SIZE}")
    texts = [_checked(caption) for caption in captions]
    if not texts:
        raise UserError("no captions to train the text tokenizer on")
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
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD_TOKEN)


class CaptionEncoder:
    """Turns captions into rows of `text_length` token ids."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", text_length: int) -> None:
        """Wraps a tokenizer.

        Args:
            tokenizer: As `train_text_tokenizer` makes it.
            text_length: Tokens per caption, padding included.

        Raises:
            UserError: `text_length` below 1, or the pad token is not id 0.
        """
        if text_length < 1:
            raise UserError(f"text_length is {text_length}, wanted at least 1")
        if tokenizer.pad_token_id != PAD_TOKEN_ID:
            raise UserError(f"pad_token_id is {tokenizer.pad_token_id}, wanted {PAD_TOKEN_ID}")
        self.tokenizer = tokenizer
        self.text_length = text_length
        self.num_encoded = 0
        self.num_truncated = 0

    @property
    def vocab_size(self) -> int:
        """Number of different token ids."""
        return len(self.tokenizer)

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
            raise ValueError(f"captions is the string {captions!r}, wanted a list of strings")
        text_token_ids = torch.full((len(captions), self.text_length), PAD_TOKEN_ID)
        if not captions:
            return text_token_ids
        rows = self.tokenizer(
            [_checked(caption) for caption in captions],
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        for index, row in enumerate(rows):
            if len(row) > self.text_length:
                self._count_truncated(captions[index], len(row))
            kept = row[: self.text_length]
            text_token_ids[index, : len(kept)] = torch.tensor(kept)
        self.num_encoded += len(captions)
        return text_token_ids

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
        rules = self.tokenizer.backend_tokenizer.to_str()
        return hashlib.sha256(f"{self.text_length} {rules}".encode()).hexdigest()[:16]

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a folder in the format of transformers; `model_max_length` is `text_length`.

        Args:
            folder: Created if missing.
        """
        self.tokenizer.model_max_length = self.text_length
        self.tokenizer.save_pretrained(str(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "CaptionEncoder":
        """Reads a folder that `save_pretrained` wrote; never goes to the network.

        Args:
            folder: The tokenizer's folder.

        Returns:
            An encoder with the counters at zero.

        Raises:
            UserError: The folder holds no tokenizer, or one without `text_length`.
        """
        from transformers import PreTrainedTokenizerFast

        path = Path(folder)
        if not (path / "tokenizer.json").is_file():
            raise UserError(f"no text tokenizer in {path}: tokenizer.json is missing")
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
        except Exception as error:  # the Rust side raises bare Exception for a damaged file
            raise UserError(f"cannot read the text tokenizer in {path}: {error}") from error
        length = tokenizer.model_max_length
        if not isinstance(length, int) or length > _MAX_TEXT_LENGTH:
            raise UserError(
                f"model_max_length (the text length) of the tokenizer in {path} is {length!r}, "
                f"wanted a whole number up to {_MAX_TEXT_LENGTH}"
            )
        return cls(tokenizer, length)


def _checked(caption: str) -> str:
    if not caption.strip():
        raise UserError(f"caption is empty ({caption[:20]!r}), wanted some text")
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"caption {caption[:100]!r} is not valid Unicode text") from error
    return caption
