"""A run's pictures: what it says about those that it leaves out, and how far it is."""

import json
from pathlib import Path

from dalle_mini_impl.training.sources import DataConfig, load_pairs
from tests.reference import tiny


def test_all_that_is_left_out_is_listed_and_the_list_begins_anew(tmp_path: Path) -> None:
    folder, file, shown = tmp_path / "pictures", tmp_path / "skipped.jsonl", list[str]()
    folder.mkdir()
    for number in range(20):
        tiny.draw_picture(number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("" if number < 7 else "a picture")

    def load(split: str) -> None:
        config = DataConfig(source=str(folder))
        load_pairs(config, split, image_size=8, skipped_file=file, show=shown.append)

    load("train")
    load("train")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert rows == [
        {"path": f"{number}.png", "reason": f"no caption: {number}.txt is empty"}
        for number in range(7)
    ]
    assert f"skipped 2 more; {file} lists all" in shown
    load("val")
    assert len(file.read_text(encoding="utf-8").splitlines()) == 7
    for number in range(7):
        (folder / f"{number}.txt").write_text("a picture")
    load("train")
    assert not file.exists()
