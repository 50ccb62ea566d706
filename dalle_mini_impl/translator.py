"""Texts in, texts out: an encoder-decoder Transformer, its vocabulary and a beam search."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from dalle_mini_impl.data.text_tokenizer import TextTokenizer
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.models.seq2seq import (
    PAD_TOKEN_ID,
    EncoderDecoder,
    EncoderDecoderConfig,
)
from dalle_mini_impl.sampling.beam_search import BeamConfig, beam_search
from vqvae.serialization import (
    build_checked,
    build_config,
    load_weights,
    own_file,
    read_json,
    save_weights,
)

CONFIG_NAME, WEIGHTS_NAME, TOKENIZER_NAME = "config.json", "model.safetensors", "text_tokenizer"
BATCH_SIZE = 64


class Translator:
    """Translates texts with a trained model."""

    def __init__(
        self,
        model: EncoderDecoder,
        text_tokenizer: TextTokenizer,
        *,
        beam: BeamConfig | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            model: Writes the tokens.
            text_tokenizer: The vocabulary of both languages; its length bounds both texts.
            beam: How to search.

        Raises:
            UserError: If the model has another vocabulary.
        """
        if model.vocab_size != text_tokenizer.vocab_size:
            raise UserError(
                f"vocab_size: got {model.vocab_size} in the model and {text_tokenizer.vocab_size} in the "
                "tokenizer, expected as many in both"
            )
        self.model, self.text_tokenizer, self.beam = model, text_tokenizer, beam or BeamConfig()

    def __call__(self, texts: Sequence[str], *, beam: BeamConfig | None = None) -> list[str]:
        """Translate.

        Args:
            texts: One per row.
            beam: Another way to search than the translator's own.

        Returns:
            A translation of each, in lower case as all texts are read.

        Raises:
            UserError: If a text is empty, or none.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"texts: got {texts!r:.60}, expected a list of strings")
        if not all(text.strip() for text in texts):
            raise UserError("texts: got an empty one, expected some text in each")
        device = self.model.embedding.weight.device
        translations: list[str] = []
        for start in range(0, len(texts), BATCH_SIZE):
            source = self.text_tokenizer.encode(texts[start : start + BATCH_SIZE]).to(device)
            found = beam_search(
                self.model, source, beam or self.beam, max_length=self.text_tokenizer.text_length
            )
            for row in found.token_ids.tolist():
                kept = [token for token in row if token != PAD_TOKEN_ID]
                translations.append(self.text_tokenizer.tokenizer.decode(kept).strip())
        return translations

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model, its config and the tokenizer.

        Args:
            folder: Made if missing.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(self.model, folder / WEIGHTS_NAME, dtype=torch.float32)
        self.text_tokenizer.save_pretrained(folder / TOKENIZER_NAME)
        config = {
            "model": dataclasses.asdict(self.model.config),
            "beam": dataclasses.asdict(self.beam),
            "vocab_size": self.model.vocab_size,
        }
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Translator":
        """Load what ``save_pretrained`` wrote, strictly.

        Args:
            folder: A translator's folder.

        Returns:
            The translator in evaluation mode, on the CPU.

        Raises:
            UserError: If the folder is none, or its parts are damaged or do not fit.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"model: {folder}: no such folder")
        try:
            values = read_json(own_file(folder, CONFIG_NAME))
            config = build_config(EncoderDecoderConfig, values["model"])
            vocab_size = values["vocab_size"]
            weights = own_file(folder, WEIGHTS_NAME)
            num_layers = config.num_encoder_layers + config.num_decoder_layers
            model = build_checked(
                lambda: EncoderDecoder(config, vocab_size=vocab_size),
                weights,
                counts={
                    "num_encoder_layers": config.num_encoder_layers,
                    "num_decoder_layers": config.num_decoder_layers,
                },
                sizes={"vocab_size": vocab_size, "intermediate_size": config.intermediate_size},
                num_elements=config.hidden_size
                * (vocab_size + num_layers * (config.hidden_size + config.intermediate_size)),
            )
            load_weights(model, weights)
            beam = build_config(BeamConfig, values["beam"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"model: {folder} is no translator that loads: {reason}; expected a folder that "
                "train_translation.py wrote"
            ) from None
        return cls(model, TextTokenizer.from_pretrained(folder / TOKENIZER_NAME), beam=beam)


def score_translations(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Compare translations with the true ones.

    Args:
        hypotheses: Translations.
        references: The true ones, in the same order.

    Returns:
        ``chrf`` (Popović 2015) and ``bleu`` (Papineni et al. 2002, over characters, since these
        texts are too short for n-grams of words), both 0 to 100, and the fraction of ``exact`` ones.

    Raises:
        UserError: If sacrebleu is not installed.
    """
    try:
        import sacrebleu
    except ImportError:
        raise UserError("sacrebleu is missing; want: pip install -e '.[translation]'") from None
    pairs = list(zip(hypotheses, references, strict=True))
    return {
        "chrf": sacrebleu.corpus_chrf(list(hypotheses), [list(references)]).score,
        "bleu": sacrebleu.corpus_bleu(
            list(hypotheses), [list(references)], tokenize="char", force=True
        ).score,
        "exact": sum(hypothesis == reference for hypothesis, reference in pairs) / len(pairs),
    }
