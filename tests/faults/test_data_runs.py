"""Faults 10 and 17: bad or vanishing images in a run: counted, listed, replaced, or it stops."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from dalle_mini_impl.data.loading import load_all_pixels
from dalle_mini_impl.data.pairs import Pair, open_pairs
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.training.config import DataConfig
from dalle_mini_impl.training.run_dataset import LoadedPairs, RunRecords, load_pairs
from tests.reference import tiny
from tests.reference.log_lines import log_lines


def load(data: Path, out: Path, *, resumes: bool, max_bad_fraction: float = 0.1) -> LoadedPairs:
    out.mkdir(exist_ok=True)
    return load_pairs(
        DataConfig(source=str(data), max_bad_fraction=max_bad_fraction),
        "train",
        role="train",
        pixel_size=tiny.PIXEL_SIZE,
        records=RunRecords(folder=out, writes=True, resumes=resumes),
    )


def told(pair: Pair) -> tuple[object, ...]:
    """What a run keeps of an image."""
    return pair.path, pair.captions, pair.attributes


def listed(out: Path) -> list[dict[str, str]]:
    text = (out / "skipped.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("content", [b"", b"<html>404</html>", None], ids=["empty", "html", "gone"])
def test_a_set_of_bad_images_stops(content: bytes | None, data: Path, tmp_path: Path) -> None:
    for image in data.glob("*.png"):
        image.unlink() if content is None else image.write_bytes(content)
    expected = r"no captioned images" if content is None else r"data\.source: \d+ of .* 25\).*: "
    with pytest.raises(UserError, match=expected):
        load(data, tmp_path / "out", resumes=False, max_bad_fraction=1.0)
    with pytest.raises(UserError, match=r"no captioned images|cannot be read"):
        tiny.train(tiny.vqvae_run(data, tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("kind", ["unreadable", "missing", "without caption", "two of two kinds"])
def test_run_stops_above_the_fraction_of_bad_records(kind: str, data: Path, tmp_path: Path) -> None:
    """Four bad ones of 25 and of 30: more than 10 %, less than 20 %. Kinds are counted together."""
    lines = (data / "metadata.jsonl").read_text().splitlines()
    for number in range(4):
        if kind == "without caption" or (kind == "two of two kinds" and number >= 2):
            lines[number] = json.dumps({"file_name": f"{number}.png", "text": None})
        elif kind == "missing":
            (data / f"{number}.png").unlink()
        else:
            (data / f"{number}.png").write_bytes(b"<html>")
    (data / "metadata.jsonl").write_text("\n".join(lines))
    message, limit = r"data\.source: \d+ of .*max_bad_fraction = 0\.1 allows: 0\.png: ", 0.2
    if kind == "two of two kinds":
        message, limit = r"data\.source: 4 of 30 records cannot be used, more than", 0.14
    with pytest.raises(UserError, match=message):
        load(data, tmp_path / "out", resumes=False)
    loaded = load(data, tmp_path / "out", resumes=False, max_bad_fraction=limit)
    assert len(loaded.pairs) == len(loaded.pixels) == 21
    rows = listed(tmp_path / "out")
    assert sorted(row["path"] for row in rows) == [f"{n}.png" for n in range(4)]
    assert all(row["reason"] for row in rows)


def test_image_that_vanishes_during_reading_is_skipped(data: Path) -> None:
    pairs = open_pairs(str(data), split="train")

    def progress(done: int, total: int) -> None:
        del done, total
        (data / "28.png").unlink(missing_ok=True)

    (data / "0.png").unlink()
    _, kept, bad = load_all_pixels(pairs, pixel_size=tiny.PIXEL_SIZE, progress=progress)
    assert {record.path for record in bad} >= {"0.png"}
    assert all("cannot be read (No such file" in record.reason for record in bad)
    assert len(kept) + len(bad) == 25


@pytest.mark.slow
def test_run_needs_no_image_after_it_has_read_them(data: Path, tmp_path: Path) -> None:
    def remove(line: str) -> None:
        if line.startswith("val: "):
            for image in data.iterdir():
                image.unlink()

    tiny.train(tiny.vqvae_run(data, tmp_path / "whole"))
    with log_lines(remove):
        tiny.train(tiny.vqvae_run(data, tmp_path / "removed"))
    assert tiny.losses(tmp_path / "removed") == tiny.losses(tmp_path / "whole")
    assert list(data.iterdir()) == []


def test_a_resumed_run_replaces_what_is_gone_alone(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = load(data, out, resumes=False)
    (data / "3.png").unlink()
    (data / "8.png").write_bytes(b"<html>")
    tiny.render_image(5).save(data / "new.png")
    with (data / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": "new.png", "text": "new", "split": "train"}) + "\n")
    again, twice = (load(data, out, resumes=True) for _ in range(2))
    assert [told(pair) for pair in again.listed] == [told(pair) for pair in first.pairs]
    assert len(again.pixels) == 25
    assert torch.equal(again.pixels, twice.pixels)
    here = [place for place, pair in enumerate(first.pairs) if pair.path not in ("3.png", "8.png")]
    for place, pair in enumerate(first.pairs):
        source = place
        if pair.path in ("3.png", "8.png"):
            number = int.from_bytes(hashlib.sha256(pair.path.encode()).digest()[:8], "big")
            source = here[number % len(here)]
            assert source != place
        assert told(again.pairs[place]) == told(first.pairs[source])
        assert torch.equal(again.pixels[place], first.pixels[source])
    weights = first.weights("color")
    assert weights is not None
    assert torch.equal(again.weights("color"), weights)  # type: ignore[arg-type]
    reasons = {row["path"]: row["reason"] for row in listed(out)}
    assert "not an image" in reasons["8.png"] or "replaced by" in reasons["8.png"]
    assert [row["path"] for row in listed(out)].count("8.png") == 2  # why, and by what
    assert any("gone since the run began, replaced by" in row["reason"] for row in listed(out))


def test_a_resumed_run_stops_when_too_many_are_gone(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    load(data, out, resumes=False)
    lines = (data / "metadata.jsonl").read_text().splitlines()
    (data / "metadata.jsonl").write_text("\n".join(lines[10:]))
    with pytest.raises(UserError, match=r"9 of the 25 images that this run began with are gone"):
        load(data, out, resumes=True)
    (out / "images-train.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"resume: .*images-train\.jsonl cannot be read"):
        load(data, out, resumes=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vqvae", "dalle"])
def test_lost_image_keeps_sample_order_on_resume(kind: str, data: Path, tmp_path: Path) -> None:
    vqvae, _ = tiny.train(tiny.vqvae_run(data, tmp_path / "tokenizer"))

    def config(out: Path, **training: int) -> object:
        if kind == "vqvae":
            return tiny.vqvae_run(data, out, **training)
        return tiny.dalle_run(data, vqvae, out, **training)

    out = tmp_path / "out"
    tiny.train(config(out, max_steps=3))  # type: ignore[arg-type]
    lost = data / "1.png"
    lost.unlink()
    _, lines = tiny.train(config(out, max_steps=6), resume="latest")  # type: ignore[arg-type]
    assert any("1 missing images are replaced" in line for line in lines)
    assert len(tiny.losses(out)) == 6


@pytest.mark.parametrize("count", [1, 7])
def test_a_set_smaller_than_a_batch_is_trained_on(count: int, data: Path, tmp_path: Path) -> None:
    lines = (data / "metadata.jsonl").read_text().splitlines()
    train = [line for line in lines if '"train"' in line][:count]
    held_out = [line for line in lines if '"val"' in line]
    (data / "metadata.jsonl").write_text("\n".join(train + held_out))
    tiny.train(tiny.vqvae_run(data, tmp_path / "run", max_steps=2))
    assert len(tiny.losses(tmp_path / "run")) == 2
