"""A whole translation run: pairs of texts in, translator's folder and a report out."""

import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_mini_impl.builtin_datasets.translation_pairs import (
    EMOJI,
    TextPair,
    TextPairs,
    load_text_pairs,
    nearest_targets,
)
from dalle_mini_impl.data.bpe_dropout import encode_variants
from dalle_mini_impl.data.text_tokenizer import TextTokenizer
from dalle_mini_impl.models.seq2seq import PAD_TOKEN_ID, EncoderDecoder, EncoderDecoderConfig
from dalle_mini_impl.sampling.beam_search import BeamConfig
from dalle_mini_impl.training.config import TextConfig, TrainingConfig
from dalle_mini_impl.training.run import begin_run, run_task
from dalle_mini_impl.training.task import ImageGrid
from dalle_mini_impl.training.tracking import TrackingConfig
from dalle_mini_impl.translator import Translator, score_translations

logger = logging.getLogger(__name__)

EVALUATION_BATCH_SIZE = 128


@dataclass(frozen=True, kw_only=True)
class TranslationTaskConfig:
    """What the loss is made of.

    Raises:
        ValueError: If a share is not in [0, 1).
    """

    label_smoothing: float = 0.1
    """Fraction of the target's probability spread over all tokens (Szegedy et al. 2016,
    arXiv:1512.00567; Vaswani et al. 2017, section 5.4)."""
    bpe_dropout_probability: float = 0.0
    """Probability that a merge is left out when a training text is split into tokens (Provilkov et
    al. 2020, arXiv:1910.13267)."""

    def __post_init__(self) -> None:
        """Refuse shares outside [0, 1)."""
        for name, value in vars(self).items():
            if not 0 <= value < 1:
                raise ValueError(f"task.{name}: got {value}, expected 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class TextPairsConfig:
    """Which pairs of texts a run uses.

    Raises:
        ValueError: If a value is out of range.
    """

    source: str = EMOJI
    """``emoji`` for English and Korean names of emoji, or a UTF-8 file with a source, a tab and a
    target per line."""
    held_out_percent: int = 10
    """Fraction of the families of pairs that are only measured, and of the names of emoji with a skin
    tone in the other families."""

    def __post_init__(self) -> None:
        """Refuse shares that leave nothing to learn or to measure."""
        if not 1 <= self.held_out_percent <= 50:
            raise ValueError(
                f"data.held_out_percent: got {self.held_out_percent}, expected 1 to 50"
            )


@dataclass(frozen=True, kw_only=True)
class TranslationRunConfig:
    """Options of ``train_translation.py``."""

    output_dir: str
    """Folder of the run: checkpoints, metrics, ``report.json``, and ``model/`` at the end."""
    data: TextPairsConfig = field(default_factory=TextPairsConfig)
    """Pairs to learn from."""
    text: TextConfig = field(default_factory=lambda: TextConfig(vocab_size=1024, text_length=48))
    """The tokens of both languages."""
    model: EncoderDecoderConfig = field(default_factory=EncoderDecoderConfig)
    """The Transformer."""
    task: TranslationTaskConfig = field(default_factory=TranslationTaskConfig)
    """Its loss."""
    beam: BeamConfig = field(default_factory=BeamConfig)
    """How translations are searched at the end."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Budget and optimizer."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where metrics go."""


class TranslationTask:
    """Pairs of token rows, and the loss of writing the second from the first."""

    num_uniforms = 2

    def __init__(
        self, pairs: TextPairs, translator: Translator, config: TranslationTaskConfig
    ) -> None:
        """Encode the pairs.

        Args:
            pairs: What is learned and what is measured.
            translator: Holds the vocabulary and the model that is trained.
            config: The loss.
        """
        self.pairs, self.translator, self.config = pairs, translator, config
        self.train = self._encode(pairs.train, dropout=config.bpe_dropout_probability)
        self.held_out = tuple(table[:, 0] for table in self._encode(pairs.held_out, dropout=0.0))
        self.references = [self.normalize(pair.target) for pair in pairs.held_out]
        self.num_samples = len(pairs.train)
        self.tokens_per_sample = self.train[0].shape[-1] + self.train[1].shape[-1]
        self.sample_weights: Tensor | None = torch.tensor(pairs.family_weights())
        digest = hashlib.sha256(translator.text_tokenizer.fingerprint().encode())
        for token_ids in (*self.train, *self.held_out):
            digest.update(token_ids.numpy().tobytes())
        self.identity = digest.hexdigest()[:16]

    def normalize(self, text: str) -> str:
        """Bring a text to the form in which the tokenizer reads and writes."""
        return self.translator.text_tokenizer.tokenizer.normalizer.normalize_str(text)

    def make_batch(
        self, sample_ids: Int[Tensor, " batch"], uniforms: Float[Tensor, "batch num_uniforms"]
    ) -> dict[str, Tensor]:
        """Look up the tokens, each text in one of its variants."""
        source, target = (
            _trim(table[sample_ids, (uniform * table.shape[1]).long()])
            for table, uniform in zip(self.train, uniforms.unbind(1), strict=True)
        )
        return {"source_token_ids": source, "target_token_ids": target}

    def loss(
        self,
        model: nn.Module,
        batch: dict[str, Tensor],
        *,
        progress: float,
        generator: torch.Generator,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the smoothed loss in nats per token, and the plain one as a metric."""
        del progress, generator
        target = batch["target_token_ids"]
        logits = model(batch["source_token_ids"], target)
        end_token_id = self.translator.model.end_token_id
        nats = target_nats(logits, target, end_token_id=end_token_id)
        loss = target_nats(
            logits,
            target,
            end_token_id=end_token_id,
            label_smoothing=self.config.label_smoothing,
        )
        return loss, {"nats": nats.detach()}

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Measure nats per token, and greedy translations, of held-out pairs."""
        step = max(1, self.num_samples // 256)
        train = [table[::step, 0] for table in self.train]
        greedy = self.translator(
            [pair.source for pair in self.pairs.held_out], beam=BeamConfig(num_beams=1)
        )
        scores = score_translations(greedy, self.references)
        return {
            "validation/nats": self._nats(model, *self.held_out),
            "validation/train_nats": self._nats(model, *train),
            **{f"validation/greedy_{name}": value for name, value in scores.items()},
        }

    def make_image_grids(self, model: nn.Module) -> list[ImageGrid]:
        """Generate nothing."""
        del model
        return []

    def _encode(self, pairs: list[TextPair], *, dropout: float) -> tuple[Tensor, Tensor]:
        """Encode sources and targets: (pairs, variants, length), variant 0 the usual one."""
        source, target = (
            self._encode_texts([getattr(pair, name) for pair in pairs], dropout)
            for name in ("source", "target")
        )
        return source, target

    def _encode_texts(self, texts: list[str], dropout: float) -> Tensor:
        text_tokenizer = self.translator.text_tokenizer
        if dropout == 0:
            return _trim(text_tokenizer.encode(texts, log_truncated=True)).unsqueeze(1)
        rows = _trim(encode_variants(text_tokenizer, texts, dropout=dropout))
        return rows.unflatten(0, (len(texts), -1))

    def _nats(self, model: nn.Module, source: Tensor, target: Tensor) -> float:
        device = next(model.parameters()).device
        total = 0.0
        for rows in torch.arange(len(source)).split(EVALUATION_BATCH_SIZE):
            prediction = target[rows].to(device)
            logits = model(source[rows].to(device), prediction).float()
            nats = target_nats(logits, prediction, end_token_id=self.translator.model.end_token_id)
            total += float(nats) * len(rows) / len(source)
        return total


def train_translation(
    config: TranslationRunConfig,
    *,
    resume: str | None = None,
) -> Path:
    """Train a translator and compare it with answers that need no model.

    Args:
        config: The run.
        resume: None, ``latest`` or a checkpoint folder.

    Returns:
        The translator's folder; ``report.json`` and ``translations.tsv`` lie beside it.

    Raises:
        UserError: If the data or the folders do not serve.
    """
    with begin_run(config, resume) as accelerator:
        task = _prepare(config)
        translator = task.translator
        folder = run_task(
            translator.model,
            task,
            config,
            accelerator=accelerator,
            resume=resume,
            save_pretrained=translator.save_pretrained,
        )
        if accelerator.is_main_process:
            _write_report(task, Path(config.output_dir))
        accelerator.wait_for_everyone()
    return folder


def _prepare(config: TranslationRunConfig) -> TranslationTask:
    """Read the pairs, learn their tokens, build the model."""
    score_translations(["-"], ["-"])  # complains now, not at the end, if sacrebleu is missing
    pairs = load_text_pairs(config.data.source, held_out_percent=config.data.held_out_percent)
    logger.info(f"{len(pairs.train)} pairs to learn, {len(pairs.held_out)} held out")
    text_tokenizer = TextTokenizer.learn(
        (text for pair in pairs.train for text in (pair.source, pair.target)),
        vocab_size=config.text.vocab_size,
        text_length=config.text.text_length,
    )
    torch.manual_seed(config.training.seed)
    model = EncoderDecoder(config.model, vocab_size=text_tokenizer.vocab_size)
    return TranslationTask(pairs, Translator(model, text_tokenizer, beam=config.beam), config.task)


def _write_report(task: TranslationTask, output_dir: Path) -> None:
    """Translate what was held out, and score that beside two answers without a model."""
    task.translator.model.eval()
    held_out, references = task.pairs.held_out, task.references
    sources = [pair.source for pair in held_out]
    nearest = nearest_targets(sources, task.pairs.train)
    predictions = {
        "model": task.translator(sources),
        "nearest source": [task.normalize(text) for text in nearest],
        "copy": [task.normalize(text) for text in sources],
    }
    is_new = task.pairs.is_new_family()
    everything = range(len(held_out))
    parts = {
        "all": list(everything),
        "new combinations": [number for number in everything if not is_new[number]],
        "new families": [number for number in everything if is_new[number]],
        "new families, without skin tones": [
            number for number in everything if is_new[number] and held_out[number].is_plain
        ],
    }
    report: dict[str, dict[str, dict[str, float]]] = {}
    for part, numbers in parts.items():
        if not numbers:
            continue
        chosen = [references[number] for number in numbers]
        report[part] = {
            name: score_translations([texts[number] for number in numbers], chosen)
            for name, texts in predictions.items()
        }
        logger.info(f"held out, {part} ({len(numbers)}):")
        for name, scores in report[part].items():
            figures = f"chrF {scores['chrf']:5.1f}  BLEU {scores['bleu']:5.1f}"
            logger.info(f"  {name:15} {figures}  exact {scores['exact']:.1%}")
    (output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    rows = zip(
        sources, references, predictions["model"], predictions["nearest source"], strict=True
    )
    lines = ["source\treference\tmodel\tnearest source", *("\t".join(row) for row in rows)]
    (output_dir / "translations.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def target_nats(
    logits: Float[Tensor, "batch target_length_plus_1 vocab_plus_2"],
    target_token_ids: Int[Tensor, "batch target_length"],
    *,
    end_token_id: int,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Average the loss over each row's tokens and its end, then over rows.

    Args:
        logits: As the model makes them of these targets.
        target_token_ids: Padded on the right.
        end_token_id: What follows the last token.
        label_smoothing: Fraction of the probability spread over all tokens.

    Returns:
        Nats per token.
    """
    expected = F.pad(target_token_ids, (0, 1), value=PAD_TOKEN_ID)
    lengths = (target_token_ids != PAD_TOKEN_ID).sum(dim=1, keepdim=True)
    expected = expected.scatter(1, lengths, end_token_id)
    nats = F.cross_entropy(
        logits.flatten(0, 1), expected.flatten(), reduction="none", label_smoothing=label_smoothing
    ).view_as(expected)
    is_token = expected != PAD_TOKEN_ID
    return ((nats * is_token).sum(dim=1) / is_token.sum(dim=1)).mean()


def _trim(token_ids: Tensor) -> Tensor:
    """Cut the columns that hold nothing but pads."""
    return token_ids[:, : int((token_ids != PAD_TOKEN_ID).any(dim=0).sum())]
