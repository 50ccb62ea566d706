"""A whole translation run: pairs of texts in, translator's folder and a report out."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dalle_mini_impl.builtin_datasets.translation_pairs import (
    EMOJI,
    load_text_pairs,
    nearest_targets,
)
from dalle_mini_impl.data.text_tokenizer import CaptionEncoder
from dalle_mini_impl.models.seq2seq import EncoderDecoder, EncoderDecoderConfig
from dalle_mini_impl.sampling.beam_search import BeamConfig
from dalle_mini_impl.training.config import TextConfig, TrainingConfig
from dalle_mini_impl.training.run import begin_run, run_task
from dalle_mini_impl.training.tracking import TrackingConfig
from dalle_mini_impl.training.translation_task import TranslationTask, TranslationTaskConfig
from dalle_mini_impl.translator import Translator, score_translations


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
    """Share of the families of pairs that are only measured, and of the names of emoji with a skin
    tone in the other families."""

    def __post_init__(self) -> None:
        """Refuse shares that leave nothing to learn or to measure."""
        if not 1 <= self.held_out_percent <= 50:
            raise ValueError(f"data.held_out_percent: got {self.held_out_percent}, wanted 1 to 50")


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


def train_translation(
    config: TranslationRunConfig,
    *,
    resume: str | None = None,
    show: Callable[[str], None] = lambda line: None,
) -> Path:
    """Train a translator and compare it with answers that need no model.

    Args:
        config: The run.
        resume: None, ``latest`` or a checkpoint folder.
        show: Receives plain lines about the run, on the main process.

    Returns:
        The translator's folder; ``report.json`` and ``translations.tsv`` lie beside it.

    Raises:
        UserError: If the data or the folders do not serve.
    """
    with begin_run(config, resume, show) as (accelerator, say):
        task = _prepare(config, say)
        translator = task.translator
        folder = run_task(
            translator.model,
            task,
            config,
            accelerator=accelerator,
            resume=resume,
            show=say,
            save_pretrained=translator.save_pretrained,
        )
        if accelerator.is_main_process:
            _write_report(task, Path(config.output_dir), say)
        accelerator.wait_for_everyone()
    return folder


def _prepare(config: TranslationRunConfig, show: Callable[[str], None]) -> TranslationTask:
    """Read the pairs, learn their tokens, build the model."""
    score_translations(["-"], ["-"])  # complains now, not at the end, if sacrebleu is missing
    pairs = load_text_pairs(config.data.source, held_out_percent=config.data.held_out_percent)
    show(f"{len(pairs.train)} pairs to learn, {len(pairs.held_out)} held out")
    captions = CaptionEncoder.learn(
        (text for pair in pairs.train for text in (pair.source, pair.target)),
        vocab_size=config.text.vocab_size,
        text_length=config.text.text_length,
    )
    torch.manual_seed(config.training.seed)
    model = EncoderDecoder(config.model, vocab_size=captions.vocab_size)
    task = TranslationTask(pairs, Translator(model, captions, beam=config.beam), config.task)
    if captions.num_truncated:
        show(captions.truncation_report())
    return task


def _write_report(task: TranslationTask, output_dir: Path, show: Callable[[str], None]) -> None:
    """Translate what was held out, and score that beside two answers without a model."""
    task.translator.model.eval()
    held_out, references = task.pairs.held_out, task.references
    sources = [pair.source for pair in held_out]
    nearest = nearest_targets(sources, task.pairs.train)
    answers = {
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
            for name, texts in answers.items()
        }
        show(f"held out, {part} ({len(numbers)}):")
        for name, scores in report[part].items():
            figures = f"chrF {scores['chrf']:5.1f}  BLEU {scores['bleu']:5.1f}"
            show(f"  {name:15} {figures}  exact {scores['exact']:.1%}")
    (output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    rows = zip(sources, references, answers["model"], answers["nearest source"], strict=True)
    lines = ["source\treference\tmodel\tnearest source", *("\t".join(row) for row in rows)]
    (output_dir / "translations.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
