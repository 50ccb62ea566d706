"""The whole road in three minutes: a model learns the shapes world and draws what it is told."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dalle_mini_impl.evaluation.sections import CEILING, FLOOR
from dalle_mini_impl.evaluation.shapes_accuracy import WHOLE

REPOSITORY = Path(__file__).parents[1]
MAX_TRAINING_MINUTES = 3.0


def run(script: str, *arguments: str | Path) -> str:
    """Runs a script as a user would; returns what it printed."""
    done = subprocess.run(
        [sys.executable, f"scripts/{script}.py", *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_minutes_of_training_draw_captions_and_new_combinations_right(tmp_path: Path) -> None:
    presets = {name: REPOSITORY / f"configs/shapes/{name}.yaml" for name in ("vqvae", "dalle")}
    minutes = [
        yaml.safe_load(path.read_text())["training"]["max_minutes"] for path in presets.values()
    ]
    assert sum(minutes) <= MAX_TRAINING_MINUTES
    data = tmp_path / "data"
    run("prepare_shapes", "--out", data, "--kinds", "single")
    for name, preset in presets.items():
        shared = ["--data.source", data, "--output_dir", tmp_path / name]
        tokenizer = ["--vqvae_dir", tmp_path / "vqvae/model"] if name == "dalle" else []
        run(f"train_{name}", "--config", preset, *shared, *tokenizer, "--tracking.mode=disabled")
    run("evaluate", "--model", tmp_path / "dalle/model", "--data", data, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out/report.json").read_text())["composition"]
    shares = {
        split: {way: facts[WHOLE]["value"] for way, facts in ways.items()}
        for split, ways in found.items()
    }
    assert set(shares) == {"test", "test_compose"}
    assert shares["test"]["one picture"] >= 0.9
    assert shares["test_compose"]["one picture"] >= 0.6
    for ways in shares.values():
        assert ways[CEILING] >= 0.8  # a tokenizer of 1.2 minutes blurs small shapes
        assert ways[FLOOR] < 0.05  # the checker does not say yes to everything
