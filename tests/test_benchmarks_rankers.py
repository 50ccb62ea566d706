"""The comparison of rankers: what they gain, on candidates that are drawn once."""

import argparse
import json
from pathlib import Path

import pytest

from benchmarks.rankers import compare, run, table
from dalle_mini_impl.clip_ranker import load_clip_ranker
from dalle_mini_impl.pipeline import TextToImagePipeline
from tests.reference import tiny
from tests.reference.grid_data import write_grid_data


def test_gains_are_paired_and_bounded_by_the_oracle() -> None:
    answers = [[{"cell": float(right)} for right in row] for row in ((0, 1), (1, 0), (0, 0))]
    figures = compare(answers, {"none": [0, 0, 0], "good": [1, 0, 0], "bad": [0, 1, 1]})
    means = {name: values["cell"]["mean"]["value"] for name, values in figures.items()}
    gains = {name: values["cell"]["gain"]["value"] for name, values in figures.items()}
    third = 1 / 3
    assert means == pytest.approx(
        {"none": third, "good": 2 * third, "bad": 0, "mean of all": third, "oracle": 2 * third}
    )
    assert gains == pytest.approx(
        {"none": 0, "good": third, "bad": -third, "mean of all": 0, "oracle": third}
    )
    interval = figures["good"]["cell"]["gain"]
    assert interval["low"] == 0
    assert interval["high"] == 1
    assert "| good | 66.7 % | +33.3 (+0.0 to +100.0) |" in table(figures)


def test_candidates_are_those_of_generate_and_are_drawn_once(tmp_path: Path) -> None:
    data = write_grid_data(tmp_path / "data", styles=("twemoji", "noto"))
    tiny.build_pipeline().save_pretrained(tmp_path / "model")
    tiny.build_ranker().save_pretrained(tmp_path / "clip")
    options = argparse.Namespace(
        model=str(tmp_path / "model"), data=data, clip=str(tmp_path / "clip"), num_prompts=3,
        num_candidates=5, seed=18, temperature=1.0, guidance_scale=None, out=tmp_path / "out",
    )  # fmt: skip
    results = run(options)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    assert len(kept) == 3
    assert results["settings"]["temperature"] == 1.0
    assert json.loads(json.dumps(results)) == json.loads(json.dumps(run(options)))
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    pipeline = TextToImagePipeline.from_pretrained(options.model)
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    held_out = [row["text"] for row in rows if row["split"] == "test_compose"]
    prompts = [held_out[index * len(held_out) // 3] for index in range(3)]
    ranker = load_clip_ranker(options.clip)
    for name, rank in (("none", "none"), ("likelihood", "likelihood"), ("clip", ranker)):
        drawn = pipeline(prompts, num_candidates=5, seed=18, temperature=1.0, rank=rank)  # type: ignore[arg-type]
        # No two best candidates of this seed are alike, so that rounding does not choose.
        assert [seed - 18 for seed in drawn.seeds] == results["picks"][name]
    assert set(results["figures"]["clip"]) == {"cell", "gender", "tone", "style", "psnr_db"}
