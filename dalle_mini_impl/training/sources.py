"""Where a run's captioned pictures come from, and the processes and precision it runs on."""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from jaxtyping import Float, UInt8
from torch import Tensor

from dalle_mini_impl.data.pairs import Pair, load_all_pixels, open_pairs
from dalle_mini_impl.data.records import SkippedRecord
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.training.precision import has_fast_bf16
from dalle_mini_impl.waiting import show_now_and_then

MAX_LISTED = 5
SKIPPED_NAME = "skipped.jsonl"


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
    """Share of unreadable pictures above which the run does not start, in [0, 1]."""

    def __post_init__(self) -> None:
        """Refuse shares outside [0, 1]."""
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"data.max_bad_fraction: got {self.max_bad_fraction}, wanted 0 to 1")


@dataclass(frozen=True)
class LoadedPairs:
    """Captioned pictures in memory."""

    pairs: list[Pair]
    pixels: UInt8[Tensor, "samples 3 height width"]

    def weights(self, balance_by: str | None) -> Float[Tensor, " samples"] | None:
        """Even out the groups of an attribute.

        Args:
            balance_by: Name of the attribute, or None for equal shares.

        Returns:
            1 / sqrt(group size) of each sample, or None.

        Raises:
            UserError: If no picture has the attribute.
        """
        if balance_by is None:
            return None
        known = {name for pair in self.pairs for name in pair.attributes}
        if balance_by not in known:
            raise UserError(
                f"data.balance_by: no picture has the attribute {balance_by!r}; "
                f"wanted one of {', '.join(sorted(known)) or 'none (leave it out)'}"
            )
        groups = [str(pair.attributes.get(balance_by)) for pair in self.pairs]
        sizes = Counter(groups)
        return torch.tensor([sizes[group] ** -0.5 for group in groups])


def load_pairs(
    config: DataConfig,
    split: str,
    *,
    image_size: int,
    skipped_file: Path | None,
    show: Callable[[str], None],
) -> LoadedPairs:
    """Read one split into memory and say what was left out.

    Args:
        config: Source and limits.
        split: Which split.
        image_size: Side of the square pictures, in pixels.
        skipped_file: Lists what was left out, a JSON object per line; the training split begins it
            anew. None writes none.
        show: Receives one line per finding.

    Returns:
        The pictures that could be read, with their captions.

    Raises:
        UserError: If there is nothing to read or too much of it is bad.
    """
    try:
        source = open_pairs(config.source, split=split)
        pixels, kept, unreadable = load_all_pixels(
            source,
            image_size=image_size,
            max_bad_fraction=config.max_bad_fraction,
            progress=show_now_and_then(show, f"{split}: pictures read"),
        )
    except UserError as error:
        raise UserError(f"data.source: {error}") from None
    # The reader skips before it splits: once is enough to say so.
    skipped = [*(source.skipped if split == config.train_split else ()), *unreadable]
    for record in skipped[:MAX_LISTED]:
        show(f"skipped {record.path}: {record.reason}")
    if skipped_file is not None:
        _write_skipped(skipped, skipped_file, anew=split == config.train_split)
    if len(skipped) > MAX_LISTED:
        show(f"skipped {len(skipped) - MAX_LISTED} more; {skipped_file} lists all")
    show(f"{split}: {len(kept)} pictures from {config.source}, {len(skipped)} skipped")
    return LoadedPairs([source[index] for index in kept], pixels)


def _write_skipped(skipped: Sequence[SkippedRecord], file: Path, *, anew: bool) -> None:
    lines = [json.dumps(vars(record), ensure_ascii=False) + "\n" for record in skipped]
    try:
        if anew:
            file.unlink(missing_ok=True)
        if lines:
            with file.open("a", encoding="utf-8") as opened:
                opened.writelines(lines)
    except OSError as error:
        raise UserError(f"output_dir: cannot write {file}: {error}") from None


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
