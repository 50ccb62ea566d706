"""A report as files: `report.json` for programs, `report.md` with pictures for people."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dalle_mini_impl.errors import UserError
from dalle_mini_impl.evaluation.bootstrap import Estimate
from dalle_mini_impl.evaluation.sections import Section, Table

JSON_NAME, MARKDOWN_NAME = "report.json", "report.md"
DIGITS = 6  # significant ones


def write_report(
    out: Path, title: str, protocol: Mapping[str, Any], sections: Sequence[Section]
) -> None:
    """Write a report; nothing in it depends on the time or on the place.

    Args:
        out: Folder that can be written to.
        title: Headline.
        protocol: How the figures were made.
        sections: The figures.

    Raises:
        UserError: If it cannot be written.
    """
    content: dict[str, Any] = {"protocol": plain(protocol)}
    content |= {section.title.lower(): plain(section.figures) for section in sections}
    lines = [f"# {title}", "", *_protocol(protocol)]
    for section in sections:
        lines += _section(section)
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    try:
        for section in sections:
            for name, picture in section.pictures.items():
                picture.save(out / f"{name}.png")
        (out / MARKDOWN_NAME).write_text("\n".join(lines), encoding="utf-8")
        (out / JSON_NAME).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"out: cannot write to {out}: {error.strerror}") from None


def plain(value: Any) -> Any:
    """Turn figures into what JSON holds.

    Args:
        value: Numbers, texts, dataclasses, and lists and dictionaries of such.

    Returns:
        The same with plain dictionaries and floats of six digits.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def numbers_in(value: Any, name: str) -> dict[str, float]:
    """List the numbers of nested figures by their path, for a tracker.

    Args:
        value: Figures; lists are passed over.
        name: Path of the value itself.

    Returns:
        Path -> number; of an estimate its value alone.
    """
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
    for name in section.pictures:
        lines += [f"![{name.replace('_', ' ')}]({name}.png)", ""]
    return lines


def _table(table: Table) -> list[str]:
    right = "|".join(["---", *["--:"] * (len(table.columns) - 1)])
    rows = (f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in table.rows)
    return [f"| {' | '.join(table.columns)} |", f"|{right}|", *rows, ""]
