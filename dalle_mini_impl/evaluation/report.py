"""A report as files: `report.json` for programs, `report.md` with images for people."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dalle_mini_impl.errors import UserError
from dalle_mini_impl.evaluation.bootstrap import Estimate

JSON_NAME, MARKDOWN_NAME = "report.json", "report.md"
DIGITS = 6  # significant ones: the last bits of a float are not part of a result
REFERENCE = "reference images"
RECONSTRUCTED = f"{REFERENCE}, reconstructed"
CEILING, FLOOR = f"ceiling: {RECONSTRUCTED}", "floor: shuffled captions"
CELL_SIDE = 12  # pixels per token in a heatmap


@dataclass(frozen=True)
class Table:
    """Rows of text; the name, a word or two, is unique in the report."""

    name: str
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
    images: dict[str, Image.Image] = field(default_factory=dict)
    """By file name, without the suffix."""


def write_report(
    out: Path, title: str, protocol: Mapping[str, Any], sections: Sequence[Section]
) -> None:
    """Write a report into a folder; UserError if that fails.

    Nothing in it depends on the time or on the folder: the same figures give the same files.
    """
    content: dict[str, Any] = {"protocol": plain(protocol)}
    content |= {section.title.lower(): plain(section.figures) for section in sections}
    lines = [f"# {title}", "", *_protocol(protocol)]
    for section in sections:
        lines += _section(section)
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    try:
        for section in sections:
            for name, image in section.images.items():
                image.save(out / f"{name}.png")
        (out / MARKDOWN_NAME).write_text("\n".join(lines), encoding="utf-8")
        # last: programs take a report.json as a sign that the report is complete
        (out / JSON_NAME).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"out: cannot write to {out}: {error.strerror}") from None


def plain(value: Any) -> Any:
    """Turn nested figures into JSON values, with floats of six significant digits."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    # JSON has no NaN and no infinity: both become null.
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def numbers_in(value: Any, name: str) -> dict[str, float]:
    """List the numbers of nested figures by path, for a tracker; lists are left out."""
    if isinstance(value, Estimate):
        return {name: value.value}
    if isinstance(value, Mapping):
        parts = (numbers_in(item, f"{name}/{key}") for key, item in value.items())
        return {path: found for part in parts for path, found in part.items()}
    return {name: float(value)} if isinstance(value, int | float) else {}


def _protocol(protocol: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, value in protocol.items():
        inner = value if isinstance(value, Mapping) else {"": value}
        rows.append((name, ", ".join(f"{k} {v}".strip() for k, v in inner.items())))
    return _table(Table("protocol", ("protocol", ""), rows))


def _section(section: Section) -> list[str]:
    lines = [f"## {section.title}", "", section.text, ""]
    for table in section.tables:
        lines += _table(table)
    for name in section.images:
        lines += [f"![{name.replace('_', ' ')}]({name}.png)", ""]
    return lines


def _table(table: Table) -> list[str]:
    alignment = "|".join(["---", *["--:"] * (len(table.columns) - 1)])
    # a caption or a path may hold the character that separates cells
    rows = (f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in table.rows)
    return [f"| {' | '.join(table.columns)} |", f"|{alignment}|", *rows, ""]


def percent(estimate: Estimate) -> str:
    """Format a fraction in [0, 1], such as "97.6 % (95.2 to 99.4)"."""
    low, high = 100 * estimate.low, 100 * estimate.high
    return f"{100 * estimate.value:.1f} % ({low:.1f} to {high:.1f})"


def number(estimate: Estimate, digits: int = 3) -> str:
    """Format a figure of any unit, such as "0.583 (0.551 to 0.617)"."""
    return f"{estimate.value:.{digits}f} ({estimate.low:.{digits}f} to {estimate.high:.{digits}f})"


def fraction_table(
    name: str,
    first: str,
    fractions: Mapping[str, Mapping[str, Estimate]],
    counts: Mapping[str, int],
) -> Table:
    """Tabulate fractions (row -> column -> fraction), with the number of images of each row.

    ``first`` is the heading of the rows' names.
    """
    # Rows may lack columns: a shapes split need not have every kind of fact.
    columns = list(dict.fromkeys(column for row in fractions.values() for column in row))
    rows = [
        (row, str(counts[row]), *(percent(found[c]) if c in found else "" for c in columns))
        for row, found in fractions.items()
    ]
    return Table(name, (first, "images", *columns), rows)


def render_heatmap(
    values: Float[Tensor, "rows columns"], *, low: float, high: float
) -> Image.Image:
    """Render a gray square for each token of the grid, from black (low) to white (high)."""
    scaled = ((values - low) / max(high - low, 1e-9)).clamp(0, 1) * 255
    # Nearest neighbor keeps one flat square per token.
    image = Image.fromarray(scaled.round().to(torch.uint8).numpy())
    size = (image.width * CELL_SIDE, image.height * CELL_SIDE)
    return image.resize(size, Image.Resampling.NEAREST)
