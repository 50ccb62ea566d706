"""Fault test 23: a whole run to its end, whatever becomes of Weights & Biases.

No network, no key, a service that is killed and a run that goes on offline, each by itself:
tests/training/test_tracking.py.
"""

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.reference import tiny
from tests.reference.processes import Script, on_a_busy_machine, run_script
from tests.reference.runs import assert_same_end, config_file, newest

TRAIN = "scripts/train_vqvae.py"


def write_config(data: Path, name: str, *, mode: str) -> Path:
    run = tiny.vqvae_run(data, data.parent / name, tracking=mode, max_steps=150, every=50)
    return config_file(run)


@pytest.fixture
def home(tmp_path: Path) -> str:
    (tmp_path / "home").mkdir()
    return str(tmp_path / "home")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the process in /proc")
def test_a_service_killed_twice_costs_nothing(data: Path, home: str, tmp_path: Path) -> None:
    """Killed in a run, then in the resumed run; the run itself is stopped in between."""
    alone = {"HOME": home, "WANDB_MODE": "offline", "WANDB_API_KEY": ""}
    run_script(TRAIN, "--config", write_config(data, "straight", mode="disabled"))
    config = write_config(data, "tracked", mode="auto")
    resume: tuple[str, ...] = ()
    for step in (10, 90):
        script = Script(TRAIN, "--config", config, *resume, **alone)
        script.wait_for(rf"step {step} ")
        names = {pid: Path(f"/proc/{pid}/comm").read_text() for pid in script.children()}
        (service,) = [pid for pid, name in names.items() if "wandb-core" in name]
        os.kill(service, signal.SIGKILL)
        if step == 10:
            script.wait_for(r"step 70 ")
            script.send(signal.SIGTERM)
        code, _ = script.finish()
        assert code == (128 + signal.SIGTERM if step == 10 else 0), script.all_output()
        assert sum("W&B: cannot" in line for line in script.err) == 1
        resume = ("--resume", "latest")
    assert newest(tmp_path / "tracked").state["run_id"]
    assert_same_end(tmp_path / "straight", tmp_path / "tracked")


@pytest.mark.slow
def test_a_key_without_a_network_costs_few_seconds(data: Path, home: str, tmp_path: Path) -> None:
    """A port that nobody listens on; with a key, `auto` would go online."""
    online = {"HOME": home, "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    seconds = {}
    for mode in ("disabled", "auto"):
        script = Script(TRAIN, "--config", write_config(data, mode, mode=mode), **online)
        code, seconds[mode] = script.finish()
        assert code == 0, script.all_output()
        assert script.err == []  # not even tried, which takes half a minute to fail
    # Beside another test 12 more were seen; to fail takes 30, on an idle machine.
    assert seconds["auto"] - seconds["disabled"] < on_a_busy_machine(20)
    assert tiny.losses(tmp_path / "disabled") == tiny.losses(tmp_path / "auto")
    assert list((tmp_path / "auto" / "wandb").glob("offline-run-*"))
