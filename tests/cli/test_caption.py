"""Captions by command: ranked, completed, refused."""

import json
from pathlib import Path

import pytest

from tests.reference import tiny
from tests.reference.commands import run_here


def test_caption_ranks_and_completes(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.render_image(3).save(tmp_path / "box.png")
    (tmp_path / "list.txt").write_text("\n".join(tiny.CAPTIONS), encoding="utf-8")
    shared = ("--model", model_dir, "--num-tokens", "2", "--num-samples", "3")
    images = ("--images", tmp_path / "box.png", "--top", "12")
    assert run_here("caption", *shared, *images, "--captions-file", tmp_path / "list.txt") == 0
    row = json.loads(capsys.readouterr().out)
    assert row["image"] == str(tmp_path / "box.png")
    assert {entry["caption"] for entry in row["captions"]} == set(tiny.CAPTIONS)
    assert sum(entry["probability"] for entry in row["captions"]) == pytest.approx(1, abs=1e-3)
    nats = [entry["image_nats"] for entry in row["captions"]]
    assert nats == sorted(nats, reverse=True)

    assert run_here("caption", *shared, "--complete", "a red") == 0
    longer = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert 1 <= len(longer) <= 3
    assert all(text.startswith("a red") for text in longer)
    assert run_here("caption", *shared, *images, "--complete", "a red") == 0
    offered = {entry["caption"] for entry in json.loads(capsys.readouterr().out)["captions"]}
    assert {"a red", *longer} <= offered
    assert run_here("caption", *shared, *images) == 2
    assert "caption: none given" in capsys.readouterr().err
    assert run_here("caption", "--model", model_dir) == 2
    assert run_here("caption", *shared, "--complete", "a", "--num-tokens", "0") == 2
    assert run_here("caption", *shared, "--complete", "a", "--num-tokens", "1000") == 2
    assert "num_tokens: got 0, expected at least 1" in capsys.readouterr().err
