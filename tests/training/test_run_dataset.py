"""A run's images: what it says about those that it leaves out, and how far it is."""

import json
from pathlib import Path

import pytest

from dalle_mini_impl import progress
from dalle_mini_impl.data.token_dataset import Variation, build_token_dataset
from dalle_mini_impl.training.config import DataConfig
from dalle_mini_impl.training.run_dataset import RunRecords, load_pairs
from tests.reference import tiny
from tests.reference.log_lines import log_lines


def write_images(folder: Path, count: int, num_bad: int = 0) -> Path:
    folder.mkdir()
    for number in range(count):
        tiny.render_image(number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("" if number < num_bad else "an image")
    return folder


def test_all_that_is_left_out_is_listed_anew(tmp_path: Path) -> None:
    folder, file = write_images(tmp_path / "images", 20, num_bad=7), tmp_path / "skipped.jsonl"
    records = RunRecords(folder=tmp_path, writes=True, resumes=False)

    def load(split: str) -> None:
        config = DataConfig(source=str(folder), max_bad_fraction=0.4)
        role = "train" if split == "train" else "held_out"
        load_pairs(config, split, role=role, pixel_size=(8, 8), records=records)

    with log_lines() as shown:
        load("train")
        load("train")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    reasons = {f"{number}.png": f"no caption: {number}.txt is empty" for number in range(7)}
    assert rows == [{"path": path, "reason": reason} for path, reason in reasons.items()]
    assert f"skipped 2 more; {file} lists all" in shown
    load("val")
    assert len(file.read_text(encoding="utf-8").splitlines()) == 7
    for number in range(7):
        (folder / f"{number}.txt").write_text("an image")
    load("train")
    assert not file.exists()


def test_what_is_no_record_is_told_and_stops_nothing(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 3)
    for name in ("README", "classes", "labels"):
        (folder / f"{name}.txt").write_text("all about them")
    records = RunRecords(folder=tmp_path, writes=True, resumes=False)
    with log_lines() as shown:
        load_pairs(
            DataConfig(source=str(folder)),
            "train",
            role="train",
            pixel_size=(8, 8),
            records=records,
        )
    what = "text files without an image of the same name beside them"
    assert shown == [
        f"left out: 3 {what}: README.txt, classes.txt, labels.txt",
        f"train: 3 images from {folder}, 0 skipped",
    ]


def test_captions_and_images_are_those_that_the_config_names(tmp_path: Path) -> None:
    for number in range(2):
        path = tmp_path / "data" / f"a cup {number}.png"
        path.parent.mkdir(exist_ok=True)
        tiny.render_image(number).save(path)
    records = RunRecords(folder=tmp_path, writes=False, resumes=False)
    config = DataConfig(source=str(tmp_path / "data"), captions_from="file_name")
    loaded = load_pairs(config, "train", role="train", pixel_size=(8, 8), records=records)
    assert [pair.captions for pair in loaded.pairs] == [("a cup",)] * 2


def test_long_reading_tells_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    folder = write_images(tmp_path / "images", 3)
    silent = RunRecords(folder=tmp_path, writes=False, resumes=False)
    config, pipeline = DataConfig(source=str(folder)), tiny.build_pipeline()
    size = pipeline.vqvae.config.pixel_size
    with log_lines() as shown:
        loaded = load_pairs(config, "train", role="train", pixel_size=size, records=silent)
        build_token_dataset(
            loaded.pairs,
            loaded.pixels,
            vqvae=pipeline.vqvae,
            text_tokenizer=pipeline.text_tokenizer,
            variation=Variation(num_views=2, max_shift=1),
            cache_dir=tmp_path,
        )
    assert shown[:2] == ["train: images read: 1 of 3", "train: images read: 2 of 3"]
    assert "image tokens: encoded: 3 of 6" in shown
    assert "image tokens: encoded: 6 of 6" not in shown
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 10.0)
    with log_lines() as shown:
        load_pairs(config, "train", role="train", pixel_size=size, records=silent)
    assert shown == [f"train: 3 images from {folder}, 0 skipped"]
