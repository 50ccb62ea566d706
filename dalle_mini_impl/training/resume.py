"""Which checkpoint a run continues from, and whether that checkpoint is of this run at all."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dalle_mini_impl.errors import UserError
from dalle_mini_impl.training.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint

logger = logging.getLogger(__name__)

# Settings that a resumed run may change: how it learns from here on, how long, what it shows, where
# things lie. Folders may move, as tokens and the number of samples are compared by themselves.
MAY_CHANGE = (
    "data.max_bad_fraction",
    "data.source",
    "data.validation_split",
    "fixed_prompts",
    "init_from",
    "output_dir",
    "sampling",
    "tracking",
    "training",
    "vqvae_dir",
)
# Of `training`, the settings that decide the samples of a step and the contents of a checkpoint.
MUST_MATCH = ("ema_decay", "global_batch_size", "optimizer", "seed")


def find_checkpoint(output_dir: Path, resume: str | None) -> Checkpoint | None:
    """Open the checkpoint that ``--resume`` names: ``latest`` or a folder; None for a fresh start.

    Raises:
        UserError: If a named checkpoint is missing or damaged, or a fresh run would write over an
            older one.
    """
    root = output_dir / "checkpoints"
    if resume is None:
        refuse_used_folder(output_dir)
        return None
    if resume != "latest":
        if not Path(resume).is_dir():
            raise UserError(
                f"resume: no such folder {resume!r}, expected latest or a checkpoint folder"
            )
        return load_checkpoint(Path(resume))
    # Damaged ones are passed over here; one that is named by its folder is an error instead.
    checkpoint = newest_checkpoint(root)
    if checkpoint is None:
        logger.warning("--resume latest: no checkpoint in %s; starting at step 0", root)
    return checkpoint


def refuse_used_folder(output_dir: Path) -> None:
    """Raise a ``UserError`` if a folder holds another run's checkpoints."""
    if any((output_dir / "checkpoints").glob("step-*")):
        raise UserError(
            f"output_dir: {output_dir} already holds a run; pass --resume latest to continue it, "
            "or another output_dir"
        )


def require_same_data(checkpoint: Checkpoint, identity: str, num_samples: int) -> None:
    """Raise a ``UserError`` if a checkpoint was trained on other tokens or fewer samples."""
    if checkpoint.state.get("identity") != identity:
        raise UserError(
            f"resume: {checkpoint.path} was trained on other tokens: the image tokenizer, the "
            "images or the captions have changed since; expected them as they were, or another "
            "output_dir"
        )
    num_before = checkpoint.state.get("num_samples")
    if num_before != num_samples:
        raise UserError(
            f"resume: {checkpoint.path} was trained on {num_before} samples, now there are "
            f"{num_samples}; expected the same ones, or another output_dir"
        )


def compare_configs(checkpoint: Checkpoint, run_config: Mapping[str, Any]) -> list[str]:
    """Return a line for each setting that has changed since a checkpoint, and may.

    Raises:
        UserError: If a setting has changed that must not; it lists them all.
    """
    config = checkpoint.state.get("config")
    if not isinstance(config, Mapping):
        raise UserError(f"resume: {checkpoint.path}: config: got {config!r}, expected an object")
    before, now = _flatten(config), _flatten(run_config)
    allowed: list[str] = []
    refused: list[str] = []
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name]:
            line = f"{name} was {before[name]!r}, is {now[name]!r}"
            (allowed if _may_change(name) else refused).append(line)
    if refused:
        raise UserError(
            f"resume: {checkpoint.path} does not fit this config: {'; '.join(refused)}; expected "
            "the config that the run was started with, or another output_dir"
        )
    return allowed


def _may_change(name: str) -> bool:
    if name.startswith("training."):
        return name.removeprefix("training.") not in MUST_MATCH
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in MAY_CHANGE)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name every value by its dotted path."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
