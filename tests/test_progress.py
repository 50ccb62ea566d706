"""Lines of progress: step, loss, speed, time spent and left."""

import re
import time

import pytest

from dalle_mini_impl.progress import ProgressLine
from tests.reference.log_lines import log_lines


def test_lines_know_the_time() -> None:
    progress_line = ProgressLine(True, progress=0.5)  # resumed in the middle
    with log_lines() as lines:
        time.sleep(1.1)
        progress_line.update(6, 0.6, {"train/loss": 0.25, "train/tokens_per_second": 1234.4})
        time.sleep(1.1)
        progress_line.update(9, 0.9, {"train/loss": 0.125, "train/tokens_per_second": 1234.6})
    assert lines[0].startswith(" 60 %  step 6  loss 0.2500  1234 tokens/s  00:0")
    spent, left = (re.findall(r"00:(\d\d)", line) for line in lines)
    assert 1 <= int(spent[0]) <= 30
    assert int(spent[1]) == pytest.approx(4 * int(spent[0]), abs=4)  # a fifth is done
    assert 2 <= int(left[0]) <= 60
    assert int(left[1]) <= int(left[0])


def test_a_slow_run_gives_a_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    progress_line = ProgressLine(True, progress=0.0)
    start, later = time.monotonic(), 0.0
    monkeypatch.setattr(time, "monotonic", lambda: start + later)
    with log_lines() as lines:
        progress_line.tick(1, 0.1)
        assert lines == []
        later = 31.0
        progress_line.tick(2, 0.25)
        progress_line.tick(3, 0.3)  # at once after a line
        assert [line.split("  ")[:2] for line in lines] == [[" 25 %", "step 2"]]
        assert lines[0].endswith(" left")
        later = 45.0
        progress_line.update(4, 0.5, {"train/loss": 1.0, "train/tokens_per_second": 1.0})
        later = 70.0
        progress_line.tick(5, 0.6)
        assert len(lines) == 2
        later = 76.0
        progress_line.tick(6, 0.7)
        assert len(lines) == 3
        ProgressLine(False, progress=0.0).tick(1, 0.1)
        assert len(lines) == 3
