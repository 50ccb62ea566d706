"""From where a run goes on: which checkpoint, and whether it is of this run at all."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dalle_mini_impl.errors import UserError
from dalle_mini_impl.training.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint

logger = logging.getLogger(__name__)

# What a resumed run may do otherwise: how it learns from here on, how long, what it shows, where
# things lie.
# Folders are free, as tokens and the number of samples are compared by themselves.
MAY_CHANGE = (
    "data.max_bad_fraction",
    "data.source",
    "data.validation_split",
    "fixed_prompts",
    "output_dir",
    "sampling",
    "tracking",
    "training",
    "vqvae_dir",
)
# Of `training`, what decides the samples of a step and what a checkpoint holds.
MUST_MATCH = ("ema_decay", "global_batch_size", "optimizer", "seed")


def find_checkpoint(output_dir: Path, resume: str | None) -> Checkpoint | None:
    """Open the checkpoint that ``--resume`` names.

    Args:
        output_dir: The run's folder.
        resume: None for a fresh run, ``latest``, or a checkpoint folder.

    Returns:
        The checkpoint, or None for a fresh start.

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
    checkpoint = newest_checkpoint(root)
    if checkpoint is None:
        logger.warning("--resume latest: no checkpoint in %s; starting at step 0", root)
    return checkpoint


def refuse_used_folder(output_dir: Path) -> None:
    """Keep a fresh run out of a folder that holds another run's checkpoints.

    Args:
        output_dir: The run's folder; may be missing.

    Raises:
        UserError: If there are checkpoints.
    """
    if any((output_dir / "checkpoints").glob("step-*")):
        raise UserError(
            f"output_dir: {output_dir} already holds a run; pass --resume latest to continue it, "
            "or another output_dir"
        )


def compare_configs(checkpoint: Checkpoint, run_config: Mapping[str, Any]) -> list[str]:
    """Hold the settings of a checkpoint's run against this one's.

    Args:
        checkpoint: Its state may hold ``config``; older ones do not.
        run_config: This run's config as nested dicts and lists.

    Returns:
        A line for each setting that differs and may.

    Raises:
        UserError: If one differs that may not; it lists them all.
    """
    config = checkpoint.state.get("config", {})
    if not isinstance(config, Mapping):
        raise UserError(f"resume: {checkpoint.path}: config: got {config!r}, expected an object")
    before = _flat(config)
    now = _flat(run_config)
    free: list[str] = []
    bound: list[str] = []
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name]:
            line = f"{name} was {before[name]!r}, is {now[name]!r}"
            (free if _may_change(name) else bound).append(line)
    if bound:
        raise UserError(
            f"resume: {checkpoint.path} does not fit this config: {'; '.join(bound)}; expected the "
            "config that the run was started with, or another output_dir"
        )
    return free


def _may_change(name: str) -> bool:
    if name.startswith("training."):
        return name.removeprefix("training.") not in MUST_MATCH
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in MAY_CHANGE)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name every value by its dotted path."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
