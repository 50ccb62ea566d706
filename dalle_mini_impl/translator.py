"""Texts in, texts out: an encoder-decoder Transformer, its vocabulary and a beam search."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from dalle_mini_impl.data.text_tokenizer import TextTokenizer
from dalle_mini_impl.errors import UserError, one_line
from dalle_mini_impl.model_folder import CONFIG_NAME, TOKENIZER_FOLDER, WEIGHTS_NAME, save_model
from dalle_mini_impl.models.seq2seq import (
    PAD_TOKEN_ID,
    EncoderDecoder,
    EncoderDecoderConfig,
)
from dalle_mini_impl.sampling.beam_search import BeamConfig, beam_search
from vqvae import serialization

BATCH_SIZE = 64


class Translator:
    """Translates texts; one ``text_tokenizer`` serves both languages and bounds both texts.

    Raises:
        UserError: If model and tokenizer have other vocabularies.
    """

    def __init__(
        self,
        model: EncoderDecoder,
        text_tokenizer: TextTokenizer,
        *,
        beam: BeamConfig | None = None,
    ) -> None:
        if model.vocab_size != text_tokenizer.vocab_size:
            raise UserError(
                f"vocab_size: got {model.vocab_size} in the model and {text_tokenizer.vocab_size} "
                "in the tokenizer, expected the same size"
            )
        self.model, self.text_tokenizer, self.beam = model, text_tokenizer, beam or BeamConfig()

    def __call__(self, texts: Sequence[str], *, beam: BeamConfig | None = None) -> list[str]:
        """Translate each text, in lower case as all texts are read; ``beam`` overrides the own one.

        Raises:
            UserError: If a text is empty or not a string.
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
            # Shorter translations of a batch are padded.
            for row in found.token_ids.tolist():
                kept = [token for token in row if token != PAD_TOKEN_ID]
                translations.append(self.text_tokenizer.tokenizer.decode(kept).strip())
        return translations

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model, its config and the tokenizer."""
        config = {
            "model": dataclasses.asdict(self.model.config),
            "beam": dataclasses.asdict(self.beam),
            "vocab_size": self.model.vocab_size,
        }
        save_model(Path(folder), self.model, config, self.text_tokenizer)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Translator":
        """Load what ``save_pretrained`` wrote, strictly; in evaluation mode, on the CPU.

        Raises:
            UserError: If the folder is none, or its parts are damaged or do not fit.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"model: {folder}: no such folder")
        try:
            values = serialization.read_json(serialization.own_file(folder, CONFIG_NAME))
            config = serialization.build_config(EncoderDecoderConfig, values["model"])
            vocab_size = values["vocab_size"]
            weights = serialization.own_file(folder, WEIGHTS_NAME)
            num_layers = config.num_encoder_layers + config.num_decoder_layers
            # Sizes are compared with the file's header before memory is spent on them.
            model = serialization.build_checked(
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
            serialization.load_weights(model, weights)
            beam = serialization.build_config(BeamConfig, values["beam"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UserError(
                f"model: {folder} is no translator that loads: {one_line(error)}; expected a "
                "folder that train_translation.py wrote"
            ) from None
        return cls(model, TextTokenizer.from_pretrained(folder / TOKENIZER_FOLDER), beam=beam)


def score_translations(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Compare translations with references, in the same order.

    Returns:
        ``chrf`` (Popović 2015) and ``bleu`` (Papineni et al. 2002), both 0 to 100, and the fraction
        of ``exact`` ones.

    Raises:
        UserError: If sacrebleu is not installed.
    """
    try:
        import sacrebleu
    except ImportError:
        raise UserError("sacrebleu is missing; expected pip install -e '.[translation]'") from None
    pairs = list(zip(hypotheses, references, strict=True))
    # BLEU over characters: these texts are too short for n-grams of words.
    bleu = sacrebleu.corpus_bleu(list(hypotheses), [list(references)], tokenize="char", force=True)
    return {
        "chrf": sacrebleu.corpus_chrf(list(hypotheses), [list(references)]).score,
        "bleu": bleu.score,
        "exact": sum(hypothesis == reference for hypothesis, reference in pairs) / len(pairs),
    }
