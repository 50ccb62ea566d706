"""The whole evaluation: the same report each time, also in the W&B run of the model."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from PIL import Image

from dalle_mini_impl.cli.evaluation import EvaluationConfig, evaluate
from dalle_mini_impl.data.pairs import open_pairs
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.evaluation.report import CEILING, FLOOR, RECONSTRUCTED, REFERENCE
from dalle_mini_impl.training.checkpoint import save_checkpoint
from tests.reference import tiny
from tests.reference.grid_data import write_grid_data
from tests.reference.wandb_file import read_wandb_file

SECTIONS = ["protocol", "tokenizer", "decoder", "composition", "distribution"]
SECTIONS += ["distribution by a network", "memorization"]


@pytest.fixture(autouse=True)
def own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A user with no W&B account and no settings."""
    for name in os.environ:
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    before = torch.get_float32_matmul_precision()
    wandb.teardown()
    yield
    wandb.teardown()
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def model(model_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model_dir, tmp_path / "run" / "model")


def measure(model: Path, data: Path, out: Path, **options: Any) -> tuple[dict[str, Any], Path]:
    config = EvaluationConfig(model=str(model), data=str(data), out=out, **options)
    report = evaluate(config)
    assert report == out / "report.md"
    return json.loads((out / "report.json").read_text(encoding="utf-8")), out


def files_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "timings.json"}


def test_a_second_evaluation_writes_the_same_files(tmp_path: Path, model: Path) -> None:
    data = write_grid_data(tmp_path / "data", styles=("twemoji", "noto"), num_roles=4, num_clocks=3)
    found, first = measure(model, data, tmp_path / "first", num_candidates=2)
    _, second = measure(model, data, tmp_path / "second", num_candidates=2)
    files = files_of(first)
    assert files == files_of(second)
    assert list(found) == SECTIONS
    assert list(found["composition"]) == ["chance", "one image", "best of 2", CEILING, FLOOR]
    assert set(found["composition"]["one image"]) == {"twemoji", "noto", "all styles"}
    assert found["distribution"]["num_images"] == found["memorization"]["num_generated"] == 18
    by_network = found["distribution by a network"]
    assert by_network.keys() == found["distribution"].keys()
    assert by_network["generated"]["distance"] != found["distribution"]["generated"]["distance"]
    text = (first / "report.md").read_text(encoding="utf-8")
    for name in files:
        assert not name.endswith(".png") or f"({name})" in text
    other, _ = measure(model, data, tmp_path / "third", num_candidates=2, seed=1)
    assert other["composition"] != found["composition"]
    assert other["tokenizer"] == found["tokenizer"]
    for part in ("model", "data", "versions"):
        assert other["protocol"][part] == found["protocol"][part]


@pytest.mark.usefixtures("compiler")
def test_report_names_the_forward_pass(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = tiny.write_data(tmp_path / "data", count=120)
    wide, narrow = tmp_path / "wide", tmp_path / "narrow"
    tiny.build_pipeline(hidden_size=32).save_pretrained(wide)  # heads of 16, which it can compute
    tiny.build_pipeline().save_pretrained(narrow)
    plain, _ = measure(wide, data, tmp_path / "plain", max_samples=18)
    native, out = measure(wide, data, tmp_path / "native", max_samples=18, native="int8")
    assert "native" not in plain["protocol"]["sampling"]
    assert native["protocol"]["sampling"].pop("native") == "int8"
    assert native["protocol"] == plain["protocol"]
    assert "native int8" in (out / "report.md").read_text(encoding="utf-8")
    assert native["distribution"]["generated"] != plain["distribution"]["generated"]
    assert native["decoder"] == plain["decoder"]  # likelihoods are torch's
    assert caplog.text == ""
    other, _ = measure(narrow, data, tmp_path / "other", max_samples=2, native="int8")
    assert "native" not in other["protocol"]["sampling"]
    assert "generating with plain torch: heads of 8" in caplog.text


def test_clip_scores_and_chooses_candidates(tmp_path: Path, model: Path) -> None:
    data, clip = tiny.write_data(tmp_path / "data"), tmp_path / "clip"
    ranker = tiny.build_ranker(seed=7)  # its cosines are above 0
    ranker.save_pretrained(clip)
    options = {"num_candidates": 3, "clip": str(clip)}
    reports, scores = {}, {}
    for rank in ("likelihood", "clip", "none"):
        reports[rank], _ = measure(model, data, tmp_path / rank, rank=rank, **options)
        scores[rank] = reports[rank]["clip score"]
        assert scores[rank]["one image"] == scores["likelihood"]["one image"]
    assert list(scores["clip"]) == ["one image", "best of 3", REFERENCE, FLOOR]
    assert "best of 3" not in scores["none"]
    best = {rank: scores[rank]["best of 3"]["value"] for rank in ("likelihood", "clip")}
    assert best["clip"] > max(best["likelihood"], scores["clip"]["one image"]["value"])
    protocol = reports["clip"]["protocol"]
    assert (protocol["options"]["clip"], protocol["sampling"]["rank"]) == ("clip", "clip")
    assert "rank" not in reports["likelihood"]["protocol"]["sampling"]
    pairs = list(open_pairs(str(data), split="val"))
    images = [Image.open(data / pair.path) for pair in pairs]
    cosines = ranker.score(images, [pair.captions[0] for pair in pairs])
    expected = float(100 * cosines.clamp(min=0).mean())
    assert scores["clip"][REFERENCE]["value"] == pytest.approx(expected, rel=1e-4)
    assert "CLIP score" in (tmp_path / "clip" / "report.md").read_text(encoding="utf-8")


def test_any_captioned_images_are_evaluated(tmp_path: Path, model: Path) -> None:
    data = tiny.write_data(tmp_path / "data", count=120)
    options = {"overrides": {"guidance_scale": 1.0}, "max_samples": 18}
    found, _ = measure(model, data, tmp_path / "out", **options)
    assert list(found) == [name for name in SECTIONS if name != "composition"]
    assert found["protocol"]["sampling"]["guidance_scale"] == 1.0
    sets = {"generated", RECONSTRUCTED, "training images", REFERENCE}
    assert set(found["distribution"]) == {"num_images", *sets}
    assert set(found["decoder"]["splits"]) == {"train", "val"}
    assert len(found["memorization"]["data_copying_test"]) == 3


def test_images_are_read_as_the_models_run_read_them(tmp_path: Path, model: Path) -> None:
    """Captions from file names, here; of other images the usual way."""
    for number in range(120):
        (tmp_path / "data").mkdir(exist_ok=True)
        tiny.render_image(number).save(tmp_path / "data" / f"a red disc {number}.png")
    with pytest.raises(UserError, match=r"data\.captions_from takes captions from"):
        measure(model, tmp_path / "data", tmp_path / "out", max_samples=4)
    stored = {"data": {"source": str(tmp_path / "data"), "captions_from": "file_name"}}
    (model.parent / "config.yaml").write_text(json.dumps(stored))
    found, _ = measure(model, tmp_path / "data", tmp_path / "out", max_samples=4)
    assert set(found["decoder"]["splits"]) == {"train", "val"}
    shutil.copytree(tmp_path / "data", tmp_path / "other")
    with pytest.raises(UserError, match=r"data\.captions_from takes captions from"):
        measure(model, tmp_path / "other", tmp_path / "out", max_samples=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_samples": 0}, "max_samples: got 0, expected at least 1"),
        ({"num_candidates": 0}, "num_candidates: got 0"),
        ({"overrides": {"temperature": -1.0}}, "temperature: got -1.0, expected a number above 0"),
        ({"styles": ("noto",)}, "style: got 'noto', but this is not an emoji data set"),
        ({"clip": "no_such_folder"}, "no_such_folder"),
        ({"rank": "clip"}, "rank: got clip without --clip; expected --clip with a folder"),
    ],
)
def test_bad_options_are_refused(
    tmp_path: Path, model: Path, options: dict[str, Any], message: str
) -> None:
    data = tiny.write_data(tmp_path / "data")
    with pytest.raises(UserError, match=message):
        measure(model, data, tmp_path / "out", **options)
    assert not (tmp_path / "out" / "report.json").exists()


def write_run(run_dir: Path, *, mode: str) -> None:
    """The files of a training run next to its model."""
    save_checkpoint(run_dir / "checkpoints", step=12, tensors={}, state={"run_id": "abc123"})
    (run_dir / "config.yaml").write_text(f"tracking:\n  mode: {mode}\n  project: a-project\n")


def test_report_appears_in_the_models_run(tmp_path: Path, model: Path) -> None:
    write_run(model.parent, mode="offline")
    data = write_grid_data(tmp_path / "data", num_clocks=2)
    found, out = measure(model, data, tmp_path / "out")
    wandb.teardown()
    (folder,) = (out / "tracking" / "wandb").glob("offline-run-*")
    recorded = read_wandb_file(folder)
    assert recorded["run_id"] == "abc123"
    history = recorded["history"]
    assert set(history["trainer/global_step"]) == {12}
    (fraction,) = history["evaluation/composition/one image/twemoji/cell"]
    assert fraction == pytest.approx(found["composition"]["one image"]["twemoji"]["cell"]["value"])
    (psnr_db,) = history["evaluation/tokenizer/psnr_db"]
    assert psnr_db == pytest.approx(found["tokenizer"]["psnr_db"]["value"], rel=1e-5)
    for name in ("composition/held_out_cells", "tokenizer/worst_reconstructions"):
        (names,) = history[f"evaluation/{name}.filenames"]
        assert set(names) <= set(recorded["files"])
    (path,) = history["evaluation/decoder/loss.path"]
    table = json.loads((folder / "files" / path).read_text())
    assert table["columns"][0] == "split"
    assert [row[0] for row in table["data"]] == ["train", "test_compose", "test_clock"]
    assert recorded["config"]["evaluation"]["data"]["kind"] == "emoji"


@pytest.mark.parametrize(
    ("mode", "tracking"), [("disabled", None), ("offline", "disabled"), (None, None)]
)
def test_untracked_runs_stay_untracked(
    tmp_path: Path, model: Path, mode: str | None, tracking: str | None
) -> None:
    if mode:
        write_run(model.parent, mode=mode)
    data = write_grid_data(tmp_path / "data")
    _, out = measure(model, data, tmp_path / "out", tracking=tracking)
    assert not (out / "tracking").exists()


@pytest.mark.parametrize(
    ("obstacle", "message"), [("tracking/wandb", "W&B"), ("tracking", "cannot write to")]
)
def test_evaluation_survives_a_failing_tracker(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture, obstacle: str, message: str
) -> None:
    write_run(model.parent, mode="offline")
    file = tmp_path / "out" / obstacle
    file.parent.mkdir(parents=True)
    file.write_text("in the way")
    _, out = measure(model, write_grid_data(tmp_path / "data"), tmp_path / "out")
    assert (out / "report.md").is_file()
    assert message in caplog.text
