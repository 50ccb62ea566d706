"""From no data to a model that generates what captions of the shapes world say."""

import json
from pathlib import Path

import pytest

from dalle_mini_impl.evaluation.facts import WHOLE
from dalle_mini_impl.evaluation.report import CEILING, FLOOR
from tests.reference.processes import output_of

REPOSITORY = Path(__file__).parents[1]
# In steps, not in minutes: slow processors make a fifth of the steps. The presets' three minutes on
# two fast cores make about 1,200 and 1,000, and reach 94 and 84 % (docs/log.md).
STEPS = {"vqvae": 800, "dalle": 700}


@pytest.mark.slow
@pytest.mark.timeout(2700)
def test_short_training_generates_new_combinations(tmp_path: Path) -> None:
    presets = {name: REPOSITORY / f"configs/shapes/{name}.yaml" for name in ("vqvae", "dalle")}
    data = tmp_path / "data"
    output_of("scripts/prepare_shapes.py", "--out", data, "--kinds", "single")
    for name, preset in presets.items():
        shared = ["--data.source", data, "--output_dir", tmp_path / name]
        tokenizer = ["--vqvae_dir", tmp_path / "vqvae/model"] if name == "dalle" else []
        length = [f"--training.max_steps={STEPS[name]}", "--training.max_minutes=null"]
        options = [*shared, *tokenizer, "--tracking.mode=disabled", *length]
        output_of(f"scripts/train_{name}.py", "--config", preset, *options)
    model, out = tmp_path / "dalle/model", tmp_path / "out"
    few = ("--max-samples", "128")
    output_of("scripts/evaluate.py", "--model", model, "--data", data, "--out", out, *few)
    found = json.loads((tmp_path / "out/report.json").read_text())["composition"]
    fractions = {
        split: {way: facts[WHOLE]["value"] for way, facts in ways.items()}
        for split, ways in found.items()
    }
    assert set(fractions) == {"test", "test_compose"}
    assert fractions["test"]["one image"] >= 0.7
    assert fractions["test_compose"]["one image"] >= 0.5
    for ways in fractions.values():
        assert ways[CEILING] >= 0.7  # a tokenizer of 800 steps blurs small shapes
        assert ways[FLOOR] < 0.05  # the checker does not say yes to everything
