"""The demo: every step once, with the minutes so far; a run short of time says so."""

import re
from pathlib import Path

import pytest

from dalle_mini_impl.cli.demo import README_STEPS, steps_report
from tests.reference.commands import REPOSITORY, run_apart


@pytest.mark.parametrize(("steps", "is_short"), [(753, True), (README_STEPS, False), (0, False)])
def test_steps_report(tmp_path: Path, steps: int, is_short: bool) -> None:
    for step in (steps // 2, steps) if steps else ():
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    lines = steps_report(tmp_path)
    assert len(lines) == is_short
    assert all(f"this run made {steps}:" in line for line in lines)


@pytest.mark.slow
def test_demo_resumes(tmp_path: Path) -> None:
    """With budgets of seconds: every step, then nothing twice."""
    presets = tmp_path / "presets"
    presets.mkdir()
    for name in ("vqvae", "dalle"):
        text = (REPOSITORY / "configs" / "demo" / f"{name}.yaml").read_text()
        (presets / f"{name}.yaml").write_text(re.sub(r"max_minutes: .*", "max_minutes: 0.05", text))
    arguments = ["--out", tmp_path / "demo", "--configs", presets]
    first = run_apart("demo", *arguments)
    assert first.returncode == 0, first.stderr
    assert "Traceback" not in first.stderr
    lines = first.stdout.splitlines()
    assert "right skin tone" in first.stdout
    # Those of training, too.
    assert any("100 %  step" in line for line in lines)
    assert all(re.match(r"\[ *\d+\.\d min\] ", line) for line in lines)
    for name in ("prompts.png", "prompts_ko.png", "held_out.png"):
        assert (tmp_path / "demo" / name).is_file()
        assert name in first.stdout
    again = run_apart("demo", *arguments)
    assert again.returncode == 0, again.stderr
    assert "training" not in again.stdout
    assert again.stdout.splitlines()[-1].split("]")[1] == lines[-1].split("]")[1]
