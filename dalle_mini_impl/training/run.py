"""What every run does around the loop: tracker, resume, the resolved config, the final folder."""

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn

from dalle_mini_impl.errors import UserError
from dalle_mini_impl.hardware import build_accelerator, keep_freed_memory, use_fast_float32
from dalle_mini_impl.output_dirs import locked_folder, make_folder
from dalle_mini_impl.training.checkpoint import Checkpoint
from dalle_mini_impl.training.resume import (
    compare_configs,
    find_checkpoint,
    refuse_used_folder,
)
from dalle_mini_impl.training.task import Task
from dalle_mini_impl.training.tracking import open_tracker
from dalle_mini_impl.training.trainer import Trainer

logger = logging.getLogger(__name__)


def run_task(
    model: nn.Module,
    task: Task,
    config: Any,
    *,
    accelerator: Accelerator,
    resume: str | None,
    save_pretrained: Callable[[Path], None],
) -> Path:
    """Train a model to the end of its budget and write its folder.

    Args:
        model: Freshly built.
        task: Its data and loss.
        config: A dataclass with ``output_dir``, ``training`` and ``tracking``; kept as
            ``config.yaml`` of the run.
        accelerator: Processes, device and precision.
        resume: None, ``latest`` or a checkpoint folder.
        save_pretrained: Writes the trained model into the folder that it is given.

    Returns:
        The folder ``output_dir / "model"``.

    Raises:
        UserError: If there is nothing to resume from, or the output folder is taken.
    """
    output_dir, is_main = Path(config.output_dir), accelerator.is_main_process
    checkpoint = find_checkpoint(output_dir, resume)
    trainer = Trainer(model, task, config.training, accelerator=accelerator, output_dir=output_dir)
    logger.info(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    if checkpoint:
        logger.info(f"resuming at step {checkpoint.step} from {checkpoint.path}")
        for line in compare_configs(checkpoint, _plain(dataclasses.asdict(config))):
            logger.info(f"changed since: {line}")
        trainer.restore(checkpoint)
    if config.training.find_batch_size:
        _find_batch_size(trainer, checkpoint)
        config = dataclasses.replace(config, training=trainer.config)
    trainer.run_config = _plain(dataclasses.asdict(config))
    # Only now: a resume that does not fit leaves the records of the run as they are.
    if is_main:
        save_config(config, output_dir / "config.yaml")
    trainer.tracker = open_tracker(
        config.tracking,
        output_dir=output_dir,
        run_config=dataclasses.asdict(config),
        is_main=is_main,
        resume_step=checkpoint.step if checkpoint else 0,
        run_id=checkpoint.state["run_id"] if checkpoint else None,
    )
    folder = output_dir / "model"
    try:
        trainer.train()
        trainer.use_average()
        if is_main:
            try:
                save_pretrained(folder)
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"output_dir: cannot write {folder}: {error}; the last checkpoint is whole, "
                    "--resume latest goes on from it"
                ) from None
            trainer.tracker.log_artifact(folder, name="model", type="model")
    finally:
        trainer.tracker.close()
    accelerator.wait_for_everyone()
    logger.info(f"model folder: {folder}")
    return folder


def _find_batch_size(trainer: Trainer, checkpoint: Checkpoint | None) -> None:
    """Look for the largest micro-batch, but go on with the one that a stopped run had found."""
    before = checkpoint.state.get("config", {}).get("training", {}) if checkpoint else {}
    if before.get("find_batch_size"):
        trainer.divide_batch(before["gradient_accumulation_steps"])
    else:
        trainer.find_batch_size()
    parts, size = trainer.config.gradient_accumulation_steps, trainer.micro_batch_size
    logger.info(f"micro-batches of {size}: training.gradient_accumulation_steps {parts}")


@contextmanager
def begin_run(config: Any, resume: str | None) -> Iterator[Accelerator]:
    """Claim a run's folder, then find its device and processes.

    Args:
        config: Its options, with ``output_dir``, ``data`` and ``training``.
        resume: None, ``latest`` or a checkpoint folder.

    Yields:
        The accelerator.

    Raises:
        UserError: As ``claim_output_dir`` and ``build_accelerator``.
    """
    with claim_output_dir(config, resume):
        accelerator = build_accelerator(config.training.mixed_precision)
        use_fast_float32()
        keep_freed_memory()
        yield accelerator


@contextmanager
def claim_output_dir(config: Any, resume: str | None) -> Iterator[None]:
    """Make a run's folder and keep it for this run, before any time is spent on data.

    Args:
        config: A dataclass with ``output_dir`` and ``data``.
        resume: None, ``latest`` or a checkpoint folder.

    Raises:
        UserError: If nothing can be written there, it lies among the data, another run is at work
            in it, or a fresh run would write over an older one.
    """
    output_dir, source = Path(config.output_dir), Path(config.data.source)
    try:
        is_folder = source.is_dir()
    except OSError as error:
        raise UserError(f"data.source: {source}: {error.strerror}; expected data to read") from None
    if is_folder and output_dir.resolve().is_relative_to(source.resolve()):
        raise UserError(
            f"output_dir: {output_dir} lies inside data.source {source}, so that the run's own "
            "images would become data; expected a folder outside"
        )
    make_folder(output_dir, field="output_dir")
    if (output_dir / "checkpoints").exists():
        make_folder(output_dir / "checkpoints", field="output_dir")
    if resume is None:
        refuse_used_folder(output_dir)
    # The processes of one run share its folder. Accelerate is not up yet to say which one this is.
    if int(os.environ.get("RANK", "0")):
        yield
    else:
        with locked_folder(output_dir, field="output_dir"):
            yield


def save_config(config: Any, path: Path) -> None:
    """Write a config so that ``load_config`` reads the same one back.

    Args:
        config: A dataclass of plain values, tuples and dataclasses.
        path: YAML file.

    Raises:
        UserError: If it cannot be written.
    """
    values = _plain(dataclasses.asdict(config))
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"output_dir: cannot write {path}: {error.strerror}") from None


def _plain(value: Any) -> Any:
    """Turn tuples into lists, which is all that YAML has."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
