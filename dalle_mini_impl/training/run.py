"""One entry point for every training run: folder, processes, resume, tracking, model, report."""

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from accelerate import Accelerator
from safetensors import SafetensorError

from dalle_mini_impl.data.text_tokenizer import TextTokenizer
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.hardware import build_accelerator, keep_freed_memory, use_fast_float32
from dalle_mini_impl.output_dirs import locked_folder, make_folder
from dalle_mini_impl.training.batch_size import choose_batch_size
from dalle_mini_impl.training.config import DataConfig, TextConfig
from dalle_mini_impl.training.resume import (
    compare_configs,
    find_checkpoint,
    refuse_used_folder,
)
from dalle_mini_impl.training.run_dataset import LoadedPairs, RunRecords, load_splits
from dalle_mini_impl.training.task import Task
from dalle_mini_impl.training.tracking import open_tracker
from dalle_mini_impl.training.trainer import Trainer

logger = logging.getLogger(__name__)
REPORT_NAME = "report.json"
TaskT = TypeVar("TaskT", bound=Task)


@dataclass(frozen=True)
class RunContext:
    """The run around a task that is being built."""

    accelerator: Accelerator
    records: RunRecords

    def load_splits(
        self, data: DataConfig, *, pixel_size: tuple[int, int], needs_captions: bool = True
    ) -> tuple[LoadedPairs, LoadedPairs]:
        """Read the training and the held-out images and captions into memory."""
        return load_splits(
            data, pixel_size=pixel_size, records=self.records, needs_captions=needs_captions
        )


def learn_text_tokenizer(config: TextConfig, texts: Iterable[str]) -> TextTokenizer:
    """Train the text tokenizer of a run."""
    return TextTokenizer.learn(texts, vocab_size=config.vocab_size, text_length=config.text_length)


def run_training(
    config: Any,
    build_task: Callable[[Any, RunContext], TaskT],
    *,
    resume: str | None,
    report: Callable[[TaskT, Path], dict[str, Any]] | None = None,
) -> Path:
    """Train a model to the end of its budget; return its folder, ``output_dir / "model"``.

    Args:
        config: A dataclass with ``output_dir``, ``data``, ``training`` and ``tracking``; kept as
            ``config.yaml`` of the run.
        build_task: Reads the data and builds the model, once the output folder is claimed.
        resume: None, ``latest`` or a checkpoint folder.
        report: Measures the trained model on the main process; its result is written into the
            output folder as ``report.json``.

    Raises:
        UserError: If data or folders are of no use, or there is nothing to resume from.
    """
    with claim_output_dir(config, resume), only_main_process_informs():
        # 1. Devices, processes, precision.
        output_dir = Path(config.output_dir)
        accelerator = build_accelerator(config.training.mixed_precision)
        use_fast_float32()
        keep_freed_memory()
        is_main = accelerator.is_main_process
        # 2. Data and model.
        records = RunRecords(folder=output_dir, writes=is_main, resumes=resume is not None)
        task = build_task(config, RunContext(accelerator, records))
        trainer = _begin(config, task, accelerator, resume)
        # 3. Train, then keep the best weights.
        folder = output_dir / "model"
        try:
            trainer.train()
            trainer.use_kept()
            if is_main:
                _save_model(task, folder)
                trainer.tracker.log_artifact(folder, name="model", type="model")
        finally:
            trainer.tracker.close()
        accelerator.wait_for_everyone()  # they may read the folder
        logger.info(f"model folder: {folder}")
        # 4. Measure what was saved.
        if report is not None and is_main:
            task.model.eval()
            text = json.dumps(report(task, output_dir), indent=2)
            (output_dir / REPORT_NAME).write_text(text + "\n", encoding="utf-8")
        accelerator.wait_for_everyone()
    return folder


def _begin(config: Any, task: Task, accelerator: Accelerator, resume: str | None) -> Trainer:
    """Build the trainer, at step 0 or where a checkpoint left off, and open the tracker."""
    output_dir = Path(config.output_dir)
    checkpoint = find_checkpoint(output_dir, resume)
    trainer = Trainer(task, config.training, accelerator=accelerator, output_dir=output_dir)
    num_parameters = sum(parameter.numel() for parameter in task.model.parameters())
    logger.info(f"{num_parameters / 1e6:.1f} M parameters")
    # First compare settings, then load: a changed setting is a better message than a shape.
    if checkpoint:
        logger.info(f"resuming at step {checkpoint.step} from {checkpoint.path}")
        for line in compare_configs(checkpoint, as_plain(dataclasses.asdict(config))):
            logger.info(f"changed since: {line}")
        trainer.restore(checkpoint)
    if config.training.find_batch_size:
        choose_batch_size(trainer, checkpoint)
        config = dataclasses.replace(config, training=trainer.config)
    trainer.run_config = as_plain(dataclasses.asdict(config))
    # Only now: a resume that is refused must leave the records of the run as they are.
    if accelerator.is_main_process:
        save_config(config, output_dir / "config.yaml")
    trainer.tracker = open_tracker(
        config.tracking,
        output_dir=output_dir,
        run_config=dataclasses.asdict(config),
        is_main=accelerator.is_main_process,
        resume_step=checkpoint.step if checkpoint else 0,
        run_id=checkpoint.state.get("run_id") if checkpoint else None,
    )
    return trainer


def _save_model(task: Task, folder: Path) -> None:
    try:
        task.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"output_dir: cannot write {folder}: {error}; the last checkpoint is whole, "
            "--resume latest goes on from it"
        ) from None


@contextmanager
def claim_output_dir(config: Any, resume: str | None) -> Iterator[None]:
    """Make a run's folder and lock it for this run, before any time is spent on data.

    Raises:
        UserError: If it cannot be written, lies inside the data, is in use by another run, or
            holds checkpoints that a fresh run would write over.
    """
    output_dir = Path(config.output_dir)
    for source in (config.data.source, *getattr(config.data, "mix", ())):
        field = "data.source" if source == config.data.source else "data.mix"
        # A source need not be a folder: it may be a file, or a name on the Hub.
        try:
            is_folder = Path(source).is_dir()
        except OSError as error:
            raise UserError(f"{field}: {source}: {error.strerror}; expected data to read") from None
        if is_folder and output_dir.resolve().is_relative_to(Path(source).resolve()):
            raise UserError(
                f"output_dir: {output_dir} lies inside {field} {source}, so that the run's own "
                "images would become data; expected a folder outside"
            )
    # Checkpoints may lie on another disk, by a link.
    make_folder(output_dir, field="output_dir")
    if (output_dir / "checkpoints").exists():
        make_folder(output_dir / "checkpoints", field="output_dir")
    if resume is None:
        refuse_used_folder(output_dir)
    # The processes of a run have one folder, and the main one locks it for all.
    if _is_main_process():
        with locked_folder(output_dir, field="output_dir"):
            yield
    else:
        yield


@contextmanager
def only_main_process_informs() -> Iterator[None]:
    """Silence INFO messages of all processes but the main one, also without our scripts."""
    if _is_main_process():
        yield
        return
    loggers = [logging.getLogger(name) for name in ("dalle_mini_impl", "vqvae")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(max(each.getEffectiveLevel(), logging.WARNING))
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def _is_main_process() -> bool:
    """Ask the launcher: Accelerate is not up yet when a run begins."""
    return int(os.environ.get("RANK", "0")) == 0


def save_config(config: Any, path: Path) -> None:
    """Write a config as YAML so that ``read_config`` reads an equal one back.

    Raises:
        UserError: If it cannot be written.
    """
    values = as_plain(dataclasses.asdict(config))
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"output_dir: cannot write {path}: {error.strerror}") from None


def as_plain(value: Any) -> Any:
    """Turn tuples into lists, as in YAML and JSON."""
    if isinstance(value, dict):
        return {key: as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    return value
