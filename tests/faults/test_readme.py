"""README.md of this folder counts what is tried; pytest's own parameters are counted here."""

import importlib
import math
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent
TEXT = (FOLDER / "README.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\|.* \| (\d+) \| `(test_\w+)\.py::(test_\w+)` \|$", re.MULTILINE)
SECTION = re.compile(r"^## .*: (\d+) inputs$(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
ROWS = [(module, test, int(count)) for count, module, test in ROW.findall(TEXT)]


def num_cases(function: Any) -> int:
    marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
    return math.prod(len(mark.args[1]) for mark in marks)


@pytest.mark.parametrize(("module", "test", "count"), ROWS)
def test_each_row_counts_the_cases_of_its_test(module: str, test: str, count: int) -> None:
    assert num_cases(getattr(importlib.import_module(f"tests.faults.{module}"), test)) == count


def test_each_section_adds_up_its_rows() -> None:
    sections = SECTION.findall(TEXT)
    assert sections
    for total, body in sections:
        assert sum(int(row[0]) for row in ROW.findall(body)) == int(total)


def test_every_parametrized_data_test_has_a_row() -> None:
    named = {(module, test) for module, test, _ in ROWS}
    for path in FOLDER.glob("test_data_*.py"):
        if path.stem == "test_data_fuzz":
            continue
        module = importlib.import_module(f"tests.faults.{path.stem}")
        for name, function in vars(module).items():
            if name.startswith("test_") and hasattr(function, "pytestmark"):
                has_cases = any(mark.name == "parametrize" for mark in function.pytestmark)
                assert not has_cases or (path.stem, name) in named, name
