"""A whole CLIP run: captioned pictures in, ranker's folder and a report out."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator

from dalle_mini_impl.clip_ranker import ClipRanker
from dalle_mini_impl.data.text_tokenizer import CaptionEncoder
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.models.clip import Clip, ClipConfig, TowersConfig
from dalle_mini_impl.training.clip_task import ClipTask, ClipTaskConfig, score_retrieval
from dalle_mini_impl.training.config import TextConfig, TrainingConfig
from dalle_mini_impl.training.run import begin_run, run_task
from dalle_mini_impl.training.run_dataset import RunRecords, load_pairs
from dalle_mini_impl.training.sources import DataConfig
from dalle_mini_impl.training.tracking import TrackingConfig


@dataclass(frozen=True, kw_only=True)
class ClipRunConfig:
    """Options of ``train_clip.py``.

    Raises:
        ValueError: If a value is out of range.
    """

    data: DataConfig
    """Captioned pictures to learn from."""
    output_dir: str
    """Folder of the run: checkpoints, metrics, ``report.json``, and ``model/`` at the end."""
    image_size: int = 64
    """Side of the square pictures in pixels; others are scaled to it."""
    text: TextConfig = field(default_factory=TextConfig)
    """The caption tokenizer."""
    model: TowersConfig = field(default_factory=TowersConfig)
    """Both towers."""
    task: ClipTaskConfig = field(default_factory=ClipTaskConfig)
    """Augmentation."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Budget and optimizer. A picture's contrast is its micro-batch: accumulation and processes
    make it smaller."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where metrics go."""

    def __post_init__(self) -> None:
        """Refuse what would fail, or change the loss, only when training has begun."""
        if self.image_size < 1:
            raise ValueError(f"image_size: got {self.image_size}, wanted at least 1")
        if self.training.find_batch_size:
            raise ValueError(
                "training.find_batch_size: got true, wanted false: the pictures of a micro-batch "
                "are each other's contrast, so that its size is part of the loss"
            )


def train_clip(
    config: ClipRunConfig,
    *,
    resume: str | None = None,
    show: Callable[[str], None] = lambda line: None,
) -> Path:
    """Train a CLIP and measure retrieval.

    Args:
        config: The run.
        resume: None, ``latest`` or a checkpoint folder.
        show: Receives plain lines about the run, on the main process.

    Returns:
        The ranker's folder; ``report.json`` lies beside it.

    Raises:
        UserError: If the data or the folders do not serve.
    """
    with begin_run(config, resume, show) as (accelerator, say):
        task = _prepare(config, resume, accelerator, say)
        folder = run_task(
            task.ranker.model,
            task,
            config,
            accelerator=accelerator,
            resume=resume,
            show=say,
            save_pretrained=task.ranker.save_pretrained,
        )
        if accelerator.is_main_process:
            _write_report(task, Path(config.output_dir), say)
        accelerator.wait_for_everyone()
    return folder


def _prepare(
    config: ClipRunConfig,
    resume: str | None,
    accelerator: Accelerator,
    show: Callable[[str], None],
) -> ClipTask:
    """Read the pairs, learn their tokens, build the model."""
    records = RunRecords(
        folder=Path(config.output_dir),
        writes=accelerator.is_main_process,
        resumes=resume is not None,
    )
    with accelerator.main_process_first():  # it may write which pictures the run begins with
        train, held_out = (
            load_pairs(config.data, split, image_size=config.image_size, records=records, show=show)
            for split in (config.data.train_split, config.data.validation_split)
        )
    captions = CaptionEncoder.learn(
        (text for pair in train.listed for text in pair.captions),
        vocab_size=config.text.vocab_size,
        text_length=config.text.text_length,
    )
    torch.manual_seed(config.training.seed)
    try:
        model = Clip(
            ClipConfig(
                towers=config.model,
                image_size=config.image_size,
                vocab_size=captions.vocab_size,
                text_length=captions.text_length,
            )
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    task = ClipTask(
        train,
        held_out,
        config.task,
        ranker=ClipRanker(model, captions),
        sample_weights=train.weights(config.data.balance_by),
    )
    if captions.num_truncated:
        show(captions.truncation_report())
    return task


def _write_report(task: ClipTask, output_dir: Path, show: Callable[[str], None]) -> None:
    """Measure the trained model and write ``report.json``."""
    task.ranker.model.eval()
    scores, asked = score_retrieval(task.ranker, task.held_out), task.held_out
    chance = scores["chance_r1"]
    report = {
        "pictures": len(asked.pixels),
        "captions": len(asked.captions),
        **scores,
        "image_to_text_times_chance": scores["image_to_text_r1"] / chance,
        "text_to_image_times_chance": scores["text_to_image_r1"] / chance,
    }
    show(
        f"held out: {len(asked.pixels)} pictures, {len(asked.captions)} captions; R@1 picture to "
        f"caption {scores['image_to_text_r1']:.1%}, caption to picture "
        f"{scores['text_to_image_r1']:.1%}, chance {chance:.2%}"
    )
    (output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
