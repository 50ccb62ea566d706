"""The demo's last lines: a run that was cut short says so."""

from pathlib import Path

import pytest

from dalle_mini_impl.cli.demo import README_STEPS, steps_report


@pytest.mark.parametrize(("steps", "is_short"), [(753, True), (README_STEPS, False), (0, False)])
def test_short_runs_are_compared_with_the_readme(
    tmp_path: Path, steps: int, is_short: bool
) -> None:
    for step in (steps // 2, steps) if steps else ():
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    lines = steps_report(tmp_path)
    assert len(lines) == is_short
    assert all(f"this run made {steps}:" in line for line in lines)
