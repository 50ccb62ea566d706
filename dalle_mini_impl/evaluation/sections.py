"""The parts of a report: figures for programs, tables and pictures for people."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dalle_mini_impl.evaluation.bootstrap import Estimate

CEILING, FLOOR = "ceiling: true pictures, rebuilt", "floor: captions shuffled"
CELL_SIDE = 12  # pixels per token in a map


@dataclass(frozen=True)
class Table:
    """Some figures side by side."""

    name: str
    """A word or two, unique in the report."""
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Section:
    """One part of a report."""

    title: str
    text: str
    """What the figures mean, and where they come from."""
    figures: dict[str, Any]
    """Numbers, estimates, and dictionaries of such."""
    tables: list[Table] = field(default_factory=list)
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    """By the name of their file, without its ending."""


def percent(estimate: Estimate) -> str:
    """Write a share for a table.

    Args:
        estimate: In [0, 1].

    Returns:
        Such as "97.6 % (95.2 to 99.4)".
    """
    low, high = 100 * estimate.low, 100 * estimate.high
    return f"{100 * estimate.value:.1f} % ({low:.1f} to {high:.1f})"


def number(estimate: Estimate, digits: int = 3) -> str:
    """Write a figure for a table.

    Args:
        estimate: Of any unit.
        digits: Behind the point.

    Returns:
        Such as "0.583 (0.551 to 0.617)".
    """
    return f"{estimate.value:.{digits}f} ({estimate.low:.{digits}f} to {estimate.high:.{digits}f})"


def share_table(
    name: str, first: str, shares: Mapping[str, Mapping[str, Estimate]], counts: Mapping[str, int]
) -> Table:
    """Lay shares out, a row for each set of pictures.

    Args:
        name: Of the table.
        first: What the rows are.
        shares: Row -> column -> share; rows may lack columns.
        counts: Pictures of each row.

    Returns:
        The table.
    """
    columns = list(dict.fromkeys(column for row in shares.values() for column in row))
    rows = [
        (row, str(counts[row]), *(percent(found[c]) if c in found else "" for c in columns))
        for row, found in shares.items()
    ]
    return Table(name, (first, "pictures", *columns), rows)


def draw_map(values: Float[Tensor, "rows columns"], *, low: float, high: float) -> Image.Image:
    """Paint one value per token of the grid.

    Args:
        values: Of the tokens.
        low: Painted black.
        high: Painted white.

    Returns:
        A picture with a square for each token.
    """
    scaled = ((values - low) / max(high - low, 1e-9)).clamp(0, 1) * 255
    image = Image.fromarray(scaled.round().to(torch.uint8).numpy())
    size = (image.width * CELL_SIDE, image.height * CELL_SIDE)
    return image.resize(size, Image.Resampling.NEAREST)
