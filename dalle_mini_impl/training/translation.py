"""Training a translator: pairs of texts in, its folder, a report and its translations out."""

import hashlib
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

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
from dalle_mini_impl.models.seq2seq import PAD_TOKEN_ID, EncoderDecoder, EncoderDecoderConfig
from dalle_mini_impl.sampling.beam_search import BeamConfig
from dalle_mini_impl.training.config import TextConfig, TrainingConfig, require
from dalle_mini_impl.training.run import RunContext, learn_text_tokenizer, run_training
from dalle_mini_impl.training.task import ImageGrid
from dalle_mini_impl.training.tracking import TrackingConfig
from dalle_mini_impl.translator import Translator, score_translations

logger = logging.getLogger(__name__)

EVALUATION_BATCH_SIZE = 128
MAX_MEASURED_TRAINING_SAMPLES = 256


@dataclass(frozen=True, kw_only=True)
class TranslationTaskConfig:
    """The translator's loss."""

    label_smoothing: float = 0.1
    """Fraction of the target's probability spread over all tokens (Szegedy et al. 2016,
    arXiv:1512.00567; Vaswani et al. 2017, section 5.4)."""
    bpe_dropout_probability: float = 0.0
    """Probability that a merge is left out when a training text is split into tokens (Provilkov et
    al. 2020, arXiv:1910.13267)."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require(0 <= value < 1, f"task.{name}", value, "0 to below 1")


@dataclass(frozen=True, kw_only=True)
class TextPairsConfig:
    """Which pairs of texts a run uses."""

    source: str = EMOJI
    """``emoji`` for English and Korean names of emoji, or a UTF-8 file with a source, a tab and a
    target per line."""
    held_out_percent: int = 10
    """Percentage of the families of pairs that are held out; in the other families the same
    percentage of the names of emoji with a skin tone."""

    def __post_init__(self) -> None:
        percent = self.held_out_percent
        require(1 <= percent <= 50, "data.held_out_percent", percent, "1 to 50")


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


def train_translation(config: TranslationRunConfig, *, resume: str | None = None) -> Path:
    """Train a translator and compare it with two baselines; see ``run_training``."""
    return run_training(config, build_task, resume=resume, report=_report)


def build_task(config: TranslationRunConfig, _: RunContext) -> "TranslationTask":
    """Read the pairs, learn their tokens, build the model."""
    score_translations(["-"], ["-"])  # fails now, not at the end, if sacrebleu is missing
    pairs = load_text_pairs(config.data.source, held_out_percent=config.data.held_out_percent)
    logger.info(f"{len(pairs.train)} pairs to learn, {len(pairs.held_out)} held out")
    texts = (text for pair in pairs.train for text in (pair.source, pair.target))
    text_tokenizer = learn_text_tokenizer(config.text, texts)
    torch.manual_seed(config.training.seed)
    model = EncoderDecoder(config.model, vocab_size=text_tokenizer.vocab_size)
    return TranslationTask(pairs, Translator(model, text_tokenizer, beam=config.beam), config.task)


class TranslationUniforms(NamedTuple):
    """The random numbers of each sample, uniform in [0, 1), by what they decide."""

    source_variant: Float[Tensor, " batch"]
    target_variant: Float[Tensor, " batch"]


class TranslationTask:
    """Pairs of token rows, and the loss of writing the second from the first.

    The translator holds the vocabulary and the model in training.
    """

    num_uniforms = 2

    def __init__(
        self, pairs: TextPairs, translator: Translator, config: TranslationTaskConfig
    ) -> None:
        self.model: nn.Module = translator.model
        self.pairs, self.translator, self.config = pairs, translator, config
        self.train = self._encode(pairs.train, dropout=config.bpe_dropout_probability)
        source, target = self._encode(pairs.held_out, dropout=0.0)
        self.held_out = source[:, 0], target[:, 0]
        self.references = [self.normalize(pair.target) for pair in pairs.held_out]
        self.num_samples = len(pairs.train)
        self.tokens_per_sample = self.train[0].shape[-1] + self.train[1].shape[-1]
        self.selection_metric: str | None = None
        self.sample_weights: Tensor | None = torch.tensor(pairs.family_weights())
        # Pairs and vocabulary decide the tokens; a resumed run must have the same ones.
        digest = hashlib.sha256(translator.text_tokenizer.fingerprint().encode())
        for token_ids in (*self.train, *self.held_out):
            digest.update(token_ids.numpy().tobytes())
        self.identity = digest.hexdigest()[:16]

    def normalize(self, text: str) -> str:
        """Bring a text to the form in which the tokenizer reads and writes."""
        return self.translator.text_tokenizer.tokenizer.normalizer.normalize_str(text)

    def make_batch(
        self, sample_ids: Int[Tensor, " batch"], uniforms: Float[Tensor, "batch 2"]
    ) -> dict[str, Tensor]:
        """Look up the tokens, each text in one of its variants."""
        named = TranslationUniforms(*uniforms.unbind(1))
        source, target = self.train  # (pairs, variants, length)
        return {
            "source_token_ids": _choose(source, sample_ids, named.source_variant),
            "target_token_ids": _choose(target, sample_ids, named.target_variant),
        }

    def loss(
        self, model: nn.Module, batch: dict[str, Tensor], **_: object
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the smoothed loss in nats per token, and the plain one as a metric."""
        target, end_token_id = batch["target_token_ids"], self.translator.model.end_token_id
        logits = model(batch["source_token_ids"], target)
        nats = target_nats(logits, target, end_token_id=end_token_id)
        smoothing = self.config.label_smoothing
        loss = target_nats(logits, target, end_token_id=end_token_id, label_smoothing=smoothing)
        return loss, {"nats": nats.detach()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Measure nats per token, and greedy translations, of held-out pairs."""
        step = max(1, self.num_samples // MAX_MEASURED_TRAINING_SAMPLES)
        source, target = self.train
        greedy = self.translator(
            [pair.source for pair in self.pairs.held_out], beam=BeamConfig(num_beams=1)
        )
        scores = score_translations(greedy, self.references)
        return {
            "validation/nats": self._nats(*self.held_out),
            "validation/train_nats": self._nats(source[::step, 0], target[::step, 0]),
            **{f"validation/greedy_{name}": value for name, value in scores.items()},
        }

    def make_image_grids(self) -> list[ImageGrid]:
        """Return none: this task has no sample grid."""
        return []

    def save_pretrained(self, folder: Path) -> None:
        """Write the translator: model, vocabulary and beam settings."""
        self.translator.save_pretrained(folder)

    def _encode(self, pairs: list[TextPair], *, dropout: float) -> tuple[Tensor, Tensor]:
        """Encode sources and targets: (pairs, variants, length), variant 0 without dropout."""
        source = self._encode_texts([pair.source for pair in pairs], dropout)
        target = self._encode_texts([pair.target for pair in pairs], dropout)
        return source, target

    def _encode_texts(self, texts: list[str], dropout: float) -> Tensor:
        text_tokenizer = self.translator.text_tokenizer
        if dropout == 0:
            return _trim(text_tokenizer.encode(texts, log_truncated=True)).unsqueeze(1)
        rows = _trim(encode_variants(text_tokenizer, texts, dropout=dropout))
        return rows.unflatten(0, (len(texts), -1))

    def _nats(self, source: Tensor, target: Tensor) -> float:
        device = next(self.model.parameters()).device
        total = 0.0
        for rows in torch.arange(len(source)).split(EVALUATION_BATCH_SIZE):
            prediction = target[rows].to(device)
            logits = self.model(source[rows].to(device), prediction).float()
            nats = target_nats(logits, prediction, end_token_id=self.translator.model.end_token_id)
            total += float(nats) * len(rows) / len(source)
        return total


def target_nats(
    logits: Float[Tensor, "batch target_length_plus_1 vocab_plus_2"],
    target_token_ids: Int[Tensor, "batch target_length"],
    *,
    end_token_id: int,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Return nats per token: averaged over each row's tokens and its end, then over rows."""
    # The end token takes the place of the first pad.
    targets = F.pad(target_token_ids, (0, 1), value=PAD_TOKEN_ID)
    lengths = (target_token_ids != PAD_TOKEN_ID).sum(dim=1, keepdim=True)
    targets = targets.scatter(1, lengths, end_token_id)
    nats = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=label_smoothing
    ).view_as(targets)
    # A mean of means, so that a long text weighs as much as a short one.
    is_token = targets != PAD_TOKEN_ID
    return ((nats * is_token).sum(dim=1) / is_token.sum(dim=1)).mean()


def _trim(token_ids: Tensor) -> Tensor:
    """Cut the columns that hold nothing but pads."""
    return token_ids[:, : int((token_ids != PAD_TOKEN_ID).any(dim=0).sum())]


def _choose(table: Tensor, sample_ids: Tensor, uniforms: Tensor) -> Tensor:
    """Take one variant of each sample."""
    return _trim(table[sample_ids, (uniforms * table.shape[1]).long()])


def _report(task: TranslationTask, output_dir: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Translate the held-out texts, and compare that with two baselines."""
    # 1. Translate. Both baselines need no model: the nearest known source, and no translation.
    held_out, references = task.pairs.held_out, task.references
    sources = [pair.source for pair in held_out]
    nearest = nearest_targets(sources, task.pairs.train)
    predictions = {
        "model": task.translator(sources),
        "nearest source": [task.normalize(text) for text in nearest],
        "copy": [task.normalize(text) for text in sources],
    }
    # 2. Divide. A held-out text of a family that was trained on is a new combination (another skin
    # tone of a known emoji).
    is_new = task.pairs.is_new_family()
    numbers_of_all = range(len(held_out))
    new_families = [number for number in numbers_of_all if is_new[number]]
    parts = {
        "all": list(numbers_of_all),
        "new combinations": [number for number in numbers_of_all if not is_new[number]],
        "new families": new_families,
        "new families, without skin tones": [
            number for number in new_families if held_out[number].is_plain
        ],
    }
    # 3. Score.
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
    # 4. Show the translations themselves.
    rows = zip(
        sources, references, predictions["model"], predictions["nearest source"], strict=True
    )
    lines = ["source\treference\tmodel\tnearest source", *("\t".join(row) for row in rows)]
    (output_dir / "translations.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return report
