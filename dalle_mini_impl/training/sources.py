"""Where a run's captioned pictures come from, and the processes and precision it runs on."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from dalle_mini_impl.errors import UserError
from dalle_mini_impl.hardware import has_fast_bf16


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which captioned pictures a run uses.

    Raises:
        ValueError: If a value is out of range.
    """

    source: str
    """Image folder, folder of WebDataset tars, parquet file, or Hub name."""
    train_split: str = "train"
    """Split that is trained on."""
    validation_split: str = "val"
    """Split that is measured; 5 % are set apart where the source has no splits."""
    balance_by: str | None = None
    """Attribute whose groups are evened out: a picture's share is 1 / sqrt(group size)."""
    max_bad_fraction: float = 0.1
    """Share of bad records (no picture, no caption, not readable) above which the run stops, in
    [0, 1]. One bad record is always allowed."""

    def __post_init__(self) -> None:
        """Refuse shares outside [0, 1]."""
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"data.max_bad_fraction: got {self.max_bad_fraction}, wanted 0 to 1")


def build_accelerator(mixed_precision: Literal["auto", "no", "bf16"]) -> Accelerator:
    """Find the device and processes of this run.

    Args:
        mixed_precision: ``auto`` takes bf16 where the hardware multiplies it.

    Returns:
        Accelerate's view of the run.

    Raises:
        UserError: If the launcher started more processes than found each other.
    """
    if mixed_precision == "auto":
        mixed_precision = "bf16" if has_fast_bf16() else "no"
    # An earlier run in this process may have had another precision. The process group stays: to
    # end it and to start another under the same torchrun hangs.
    AcceleratorState._reset_state()
    # Accelerate joins processes without a GPU only when it is told that it must do without. Apple's
    # GPUs count as none: they have no float64.
    gpu = torch.accelerator.current_accelerator(check_available=True)
    accelerator = Accelerator(
        cpu=gpu is None or gpu.type == "mps",
        mixed_precision=mixed_precision,
        # One process alone tokenizes and evaluates, while the others wait.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
    )
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise UserError(
            f"WORLD_SIZE: got {expected} from the launcher, but {accelerator.num_processes} found "
            "each other; start them with torchrun --nproc_per_node or accelerate launch"
        )
    return accelerator
