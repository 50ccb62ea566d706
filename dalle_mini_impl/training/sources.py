"""Where a run's captioned pictures come from, and the processes and precision it runs on."""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator
from jaxtyping import Float, UInt8
from torch import Tensor

from dalle_mini_impl.data.pairs import Pair, load_all_pixels, open_pairs

logger = logging.getLogger(__name__)

MAX_LISTED = 5


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
            raise ValueError(
                f"data.max_bad_fraction: got {self.max_bad_fraction}, wanted 0 to 1"
            )


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
        """
        if balance_by is None:
            return None
        groups = [str(pair.attributes.get(balance_by)) for pair in self.pairs]
        sizes = Counter(groups)
        return torch.tensor([sizes[group] ** -0.5 for group in groups])


def load_pairs(
    config: DataConfig, split: str, *, image_size: int, show: Callable[[str], None]
) -> LoadedPairs:
    """Read one split into memory and say what was left out.

    Args:
        config: Source and limits.
        split: Which split.
        image_size: Side of the square pictures, in pixels.
        show: Receives one line per finding.

    Returns:
        The pictures that could be read, with their captions.

    Raises:
        UserError: If there is nothing to read or too much of it is bad.
    """
    source = open_pairs(config.source, split=split)
    pixels, kept, unreadable = load_all_pixels(
        source, image_size=image_size, max_bad_fraction=config.max_bad_fraction
    )
    skipped = [*source.skipped, *unreadable]
    for record in skipped[:MAX_LISTED]:
        show(f"skipped {record.path}: {record.reason}")
    if len(skipped) > MAX_LISTED:
        show(f"skipped {len(skipped) - MAX_LISTED} more")
    show(f"{split}: {len(kept)} pictures from {config.source}, {len(skipped)} skipped")
    return LoadedPairs([source[index] for index in kept], pixels)


def build_accelerator(mixed_precision: Literal["auto", "no", "bf16"]) -> Accelerator:
    """Find the device and processes of this run.

    Args:
        mixed_precision: ``auto`` takes bf16 where the hardware multiplies it.

    Returns:
        Accelerate's view of the run.
    """
    if mixed_precision == "auto":
        mixed_precision = "bf16" if has_fast_bf16() else "no"
    return Accelerator(mixed_precision=mixed_precision)


def has_fast_bf16() -> bool:
    """Say whether the device multiplies bf16 in hardware; emulation is slower than fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def use_fast_float32() -> None:
    """Let oneDNN multiply float32 matrices where its answer is still a float32 one.

    On several CPUs this doubles the speed of training. On others the same switch rounds to
    bf16, so the error of one product decides.
    """
    if torch.cuda.is_available():
        return
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    torch.set_float32_matmul_precision("medium")
    error = ((left @ right).double() - exact).abs().max() / exact.abs().max()
    if error > 1e-5:
        torch.set_float32_matmul_precision("highest")
