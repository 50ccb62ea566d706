"""Report files, and the numbers a tracker gets."""

import json
from pathlib import Path

import pytest
from PIL import Image

from dalle_mini_impl.errors import UserError
from dalle_mini_impl.evaluation.bootstrap import Estimate
from dalle_mini_impl.evaluation.report import Section, Table, numbers_in, write_report

FIGURES = {
    "fraction": Estimate(1 / 3, 0.25, 0.5),
    "count": 7,
    "cells": [{"z": float("nan")}],
    "deep": {"loss": 2.0, "name": "x"},
}
SECTION = Section(
    "A part",
    "What it means.",
    FIGURES,
    [Table("t", ("name", "value"), [("a | b", "1"), ("c", "2")])],
    {"an_image": Image.new("RGB", (4, 4), "red")},
)


def test_figures_tables_and_images_are_written(tmp_path: Path) -> None:
    write_report(tmp_path, "A title", {"seed": 3, "data": {"kind": "emoji"}}, [SECTION])
    found = json.loads((tmp_path / "report.json").read_text())
    assert found == {
        "protocol": {"seed": 3, "data": {"kind": "emoji"}},
        "a part": {
            "fraction": {"value": 0.333333, "low": 0.25, "high": 0.5},
            "count": 7,
            "cells": [{"z": None}],
            "deep": {"loss": 2.0, "name": "x"},
        },
    }
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# A title\n")
    assert "| data | kind emoji |\n| seed" not in text
    assert "| seed | 3 |\n| data | kind emoji |" in text
    assert "## A part\n\nWhat it means.\n\n| name | value |\n|---|--:|\n| a / b | 1 |" in text
    assert "![an image](an_image.png)" in text
    with Image.open(tmp_path / "an_image.png") as image:
        assert image.size == (4, 4)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="out: cannot write to"):
        write_report(tmp_path / "file", "", {}, [SECTION])


def test_numbers_by_path() -> None:
    assert numbers_in(FIGURES, "e") == {"e/fraction": 1 / 3, "e/count": 7.0, "e/deep/loss": 2.0}
