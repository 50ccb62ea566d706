"""Fault tests 1 to 3: kill -9 at any moment costs no more than the steps since the last save."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from benchmarks import crash_recovery
from benchmarks.crash_recovery import INTERVAL
from tests.reference import tiny
from tests.reference.processes import Script, on_a_busy_machine, run_script
from tests.reference.runs import assert_same_end, config_file, newest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and a tokenizer for the campaign's runs."""
    folder = tmp_path_factory.mktemp("campaign")
    crash_recovery.prepare(folder)
    return folder


@pytest.mark.parametrize("kind", ["tokenizer", "decoder"])
def test_a_run_killed_ten_times_ends_with_the_same_weights(folder: Path, kind: str) -> None:
    found = crash_recovery.kill_repeatedly("ours", kind, folder, kills=10)
    assert found.kills == 10
    assert found.kills_inside_a_save >= 3
    assert found.failed_resumes == 0
    assert found.largest_loss <= INTERVAL
    assert found.finished == found.equal >= 1


def test_a_kill_at_every_file_operation_of_a_save_of_a_run(folder: Path) -> None:
    """From the second save of a resumed run on, which also deletes an older checkpoint."""
    run, hits = folder / "every", 0
    exit_code, _, last = crash_recovery.attempt("ours", "decoder", folder, run, steps=12)
    assert exit_code == -signal.SIGKILL
    for event in range(1, 200):
        copy = shutil.copytree(run, folder / "copy")
        before = newest(copy)
        exit_code, resumed, last = crash_recovery.attempt(
            "ours", "decoder", folder, copy, fatal_event=event, steps=2 * INTERVAL
        )
        assert exit_code == -signal.SIGKILL
        if last >= before.step + 2 * INTERVAL:
            break  # the parent's kill: no such event
        hits += 1
        after = newest(copy)
        assert last - after.step <= INTERVAL
        assert after.step >= resumed == before.step
        shutil.rmtree(copy)
    assert hits > 30, "the kills did not reach the save"


def test_of_two_processes_one_is_killed(data: Path, tmp_path: Path) -> None:
    options = {"max_steps": 60, "every": 20, "checkpoint_every_steps": 5}
    for name in ("straight", "stopped"):
        config_file(tiny.vqvae_run(data, tmp_path / name, **options))
    command = ("scripts/train_vqvae.py", "--config")
    run_script(*command, tmp_path / "straight.yaml", processes=2)
    assert newest(tmp_path / "straight").state["num_processes"] == 2

    script = Script(*command, tmp_path / "stopped.yaml", processes=2)
    script.wait_for(r"step 1[0-9] ")
    ranks = script.children()
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    code, seconds = script.finish(seconds=300)
    assert code != 0
    assert seconds < on_a_busy_machine(30)
    for rank in ranks:
        assert not Path(f"/proc/{rank}").exists()
    found = newest(tmp_path / "stopped")
    assert 5 <= found.step < 60

    resumed = run_script(*command, tmp_path / "stopped.yaml", "--resume", "latest", processes=2)
    assert re.search(f"resuming at step {found.step} ", resumed.all_output())
    assert_same_end(tmp_path / "straight", tmp_path / "stopped")
