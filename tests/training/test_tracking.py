"""Tracking: all of it reaches `metrics.jsonl` and W&B, and nothing W&B does reaches the run."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import wandb
from PIL import Image

from dalle_mini_impl.errors import UserError
from dalle_mini_impl.training import tracking, wandb_run
from dalle_mini_impl.training.tracking import Tracker, TrackingConfig, open_tracker
from tests.reference import tiny
from tests.reference.commands import run_python
from tests.reference.limits import file_size_limit
from tests.reference.tiny import read_metrics
from tests.reference.wandb_file import WandbFile, read_wandb_file

KEY = "0123456789abcdef0123456789abcdef01234567"
OFFLINE = TrackingConfig(mode="offline", project="a-project", run_name="a name")
DISABLED = TrackingConfig(mode="disabled")
COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


OF_EVERY_RUN = """trainer/global_step progress train/loss train/learning_rate train/gradient_norm
train/samples_per_second train/tokens_per_second train/data_wait_fraction train/save_fraction"""
OF_A_TOKENIZER = """train/reconstruction_loss train/psnr_db train/batch_codebook_perplexity
validation/psnr_db validation/codebook_usage validation/codebook_perplexity"""
OF_A_DECODER = """train/image_nats train/text_nats validation/image_nats validation/text_nats
validation/image_nats_null_caption validation/log_likelihood_ratio_nats
validation/memorization_gap_nats baseline/image_uniform_nats baseline/image_unigram_nats
baseline/text_uniform_nats baseline/text_unigram_nats"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user with no W&B account, no settings and no other runs."""
    for name in os.environ:
        if name.startswith("WANDB_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.chdir(home)
    wandb.teardown()
    yield home
    wandb.teardown()


def open_run(config: TrackingConfig, output_dir: Path, **kwargs: Any) -> Tracker:
    options: dict[str, Any] = {"run_config": {}, "is_main": True} | kwargs
    return open_tracker(config, output_dir=output_dir, **options)


def read_offline_run(output_dir: Path) -> WandbFile:
    wandb.teardown()  # wandb's process may still be writing after a run was finished
    (folder,) = (output_dir / "wandb").glob("offline-run-*")
    return read_wandb_file(folder)


def our_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record for record in caplog.records if record.name == tracking.__name__]
    return [record.getMessage() for record in found if record.levelname == "WARNING"]


def make_images() -> list[Image.Image]:
    return [Image.new("RGB", (6, 4), color) for color in COLORS]


def test_an_offline_run_records_everything(
    tmp_path: Path, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output_dir = tmp_path / "runs" / "first"
    config = {"model": {"layers": 2, "betas": (0.9, 0.95)}, "path": Path("x")}
    model_dir = tmp_path / "model"
    (model_dir / "dalle").mkdir(parents=True)
    (model_dir / "dalle" / "config.json").write_text("{}")

    tracker = open_run(OFFLINE, output_dir, run_config=config)
    tracker.log({"train/loss": 2.5, "train/speed": 100}, 10)
    tracker.log({"train/loss": float("nan")}, 20)
    tracker.log({"validation/loss": 1.5}, 20)
    tracker.log_images("samples/validation", make_images(), ["a cat", "b", "größe"], 20)
    tracker.log_artifact(model_dir, "the model!", "model")
    tracker.close()
    tracker.close()
    tracker.log({"train/loss": 0.0}, 30)

    recorded = read_offline_run(output_dir)
    history = recorded["history"]
    assert history["train/loss"][0] == 2.5
    assert str(history["train/loss"][1]) == "nan"
    assert (history["train/speed"], history["validation/loss"]) == ([100], [1.5])
    assert history["trainer/global_step"] == [10, 20, 20, 20]
    assert history["samples/validation.captions"] == [["a cat", "b", "größe"]]
    (names,) = history["samples/validation.filenames"]
    assert set(names) <= set(recorded["files"])
    assert len(names) == 3
    files = next((output_dir / "wandb").glob("offline-run-*")) / "files"
    colors = [Image.open(files / name).convert("RGB").getpixel((0, 0)) for name in names]
    assert colors == COLORS
    assert "artifact:model/the_model_/dalle/config.json" in recorded["files"]
    assert recorded["config"]["model"] == {"layers": 2, "betas": [0.9, 0.95]}
    assert recorded["run_id"] == tracker.run_id

    lines = read_metrics(output_dir)
    assert [line["step"] for line in lines] == [10, 20, 20]
    assert (output_dir / "metrics.jsonl").read_text().endswith("\n")
    assert lines[0]["train/loss"] == 2.5
    assert abs(lines[0]["time"] - time.time()) < 60
    assert capfd.readouterr() == ("", "")
    in_home = [path.name for path in home.rglob("*") if path.is_file()]
    assert all(name.endswith(".log") for name in in_home), "wandb keeps data in the home folder"


def test_images_in_one_png_with_captions_beside(tmp_path: Path) -> None:
    tracker = open_run(DISABLED, tmp_path)
    images = [*make_images(), Image.new("L", (2, 2), 128)]
    tracker.log_images("samples/validation", images, ["a", "b\nc", "d", ""], 1200)
    grid = Image.open(tmp_path / "samples" / "samples_validation_00001200.png")
    assert grid.size == (6 + 2 + 6, 4 + 2 + 4)
    corners = [grid.getpixel(place) for place in ((0, 0), (8, 0), (0, 6), (8, 6), (6, 0))]
    assert corners == [*COLORS, (128, 128, 128), (255, 255, 255)]
    captions = tmp_path / "samples" / "samples_validation_00001200.txt"
    assert captions.read_text() == "a\nb c\nd\n\n"


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    tracker = open_run(OFFLINE, tmp_path / "run", is_main=False, run_id="abc")
    tracker.log({"loss": 1.0}, 1)
    tracker.log_images("samples", make_images(), ["", "", ""], 1)
    tracker.log_artifact(tmp_path, "name", "model")
    tracker.close()
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_its_id_and_rewinds(tmp_path: Path) -> None:
    tracker = open_run(OFFLINE, tmp_path)
    for step in range(1, 8):
        tracker.log({"loss": float(step)}, step)
    tracker.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "time": 1.0, "lo')

    resumed = open_run(OFFLINE, tmp_path, resume_step=5, run_id=tracker.run_id)
    resumed.log({"loss": 60.0}, 6)
    resumed.close()
    assert [line["loss"] for line in read_metrics(tmp_path)] == [1.0, 2.0, 3.0, 4.0, 5.0, 60.0]
    assert resumed.run_id == tracker.run_id is not None
    wandb.teardown()
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert [read_wandb_file(folder)["run_id"] for folder in folders] == [tracker.run_id] * 2


@pytest.mark.parametrize("rest", [b'{"step": 2, "lo', b'{"step": 2}', b"\xff\xfe\n", b"7\n", b"\n"])
def test_a_half_written_line_is_dropped(tmp_path: Path, rest: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + rest)
    tracker = open_run(DISABLED, tmp_path, resume_step=2)
    tracker.log({}, 3)  # on file at once, not at the end
    steps = [line["step"] for line in read_metrics(tmp_path)]
    assert steps == ([1, 2, 3] if rest.endswith(b"}") else [1, 3])
    tracker.close()


def test_a_new_run_puts_older_metrics_aside(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    open_run(DISABLED, tmp_path).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert (tmp_path / "metrics.jsonl.old").read_text() == '{"step": 0}\n'


def test_bad_arguments(tmp_path: Path) -> None:
    tracker = open_run(DISABLED, tmp_path)
    with pytest.raises(ValueError, match="got the names"):
        tracker.log({"step": 1.0}, 1)
    with pytest.raises(ValueError, match="got 3 for 2 captions"):
        tracker.log_images("samples", make_images(), ["", ""], 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output_dir: cannot write to"):
        open_run(DISABLED, tmp_path / "file")


@pytest.fixture
def server() -> Iterator[int]:
    """The port of a server that accepts connections and says nothing."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def black_hole() -> Iterator[int]:
    """A port where a connection is neither made nor refused: the queue of its server is full."""
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        waiting = [socket.socket() for _ in range(4)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
        yield port
        for client in waiting:
            client.close()


@pytest.fixture
def closed_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return int(listener.getsockname()[1])


def use_server(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")


def test_auto_without_a_key_is_offline_at_once(tmp_path: Path) -> None:
    started = time.perf_counter()
    tracker = open_run(TrackingConfig(), tmp_path)
    seconds = time.perf_counter() - started
    tracker.close()
    assert read_offline_run(tmp_path)["run_id"] == tracker.run_id
    assert seconds < 10.0, "0.6 s on an idle machine; wandb's own time-outs start at 15 s"


@pytest.mark.parametrize("given", ["nothing", "variables", "options"])
def test_project_and_team(given: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Options come before the variables that wandb itself reads, and these before our default."""
    expected = ("dalle-mini-impl", "")
    if given != "nothing":
        monkeypatch.setenv("WANDB_PROJECT", "mine")
        monkeypatch.setenv("WANDB_ENTITY", "my-team")
        expected = ("mine", "my-team")
    config = TrackingConfig(mode="offline")
    if given == "options":
        config = TrackingConfig(mode="offline", project="another", entity="other-team")
        expected = ("another", "other-team")
    open_run(config, tmp_path).close()
    found = read_offline_run(tmp_path)
    assert (found["project"], found["entity"]) == expected


def test_auto_needs_a_key_and_a_server(
    monkeypatch: pytest.MonkeyPatch, server: int, home: Path
) -> None:
    use_server(monkeypatch, server)
    assert wandb_run.choose_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert wandb_run.choose_mode() == "online"
    monkeypatch.delenv("WANDB_API_KEY")
    wandb.teardown()
    (home / ".netrc").write_text(f"machine 127.0.0.1:{server} login user password {KEY}\n")
    assert wandb_run.choose_mode() == "online"
    monkeypatch.setenv("NETRC", str(home / "elsewhere"))
    assert wandb_run.choose_mode() == "offline"


def test_the_old_name_of_the_service_counts(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setattr(wandb_run, "_is_reachable", lambda url: True)
    (home / ".netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert wandb_run.choose_mode() == "online"
    use_server(monkeypatch, 9)
    wandb.teardown()
    assert wandb_run.choose_mode() == "offline"


@pytest.mark.parametrize("kind", ["refused", "black hole", "slow name look-up"])
def test_auto_without_a_network_is_offline_within_a_second(
    monkeypatch: pytest.MonkeyPatch, kind: str, closed_port: int, black_hole: int
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    use_server(monkeypatch, closed_port if kind == "refused" else black_hole)

    def slow_look_up(*_: Any) -> None:
        time.sleep(6)
        raise OSError("no such name")

    if kind == "slow name look-up":
        monkeypatch.setattr(socket, "getaddrinfo", slow_look_up)
    url = os.environ["WANDB_BASE_URL"]
    started = time.perf_counter()
    assert not wandb_run._is_reachable(url)
    assert time.perf_counter() - started < 3.0
    monkeypatch.setattr(wandb_run, "CONNECT_SECONDS", 0.1)
    assert wandb_run.choose_mode() == "offline"


def test_a_proxy_counts(monkeypatch: pytest.MonkeyPatch, server: int, closed_port: int) -> None:
    monkeypatch.setenv("https_proxy", f"127.0.0.1:{server}")
    assert wandb_run._is_reachable("https://api.wandb.invalid")
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{closed_port}")
    assert not wandb_run._is_reachable("https://api.wandb.invalid")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert wandb_run._is_reachable(f"https://127.0.0.1:{server}")


@pytest.mark.parametrize("mode", ["online", "offline", "disabled"])
def test_auto_obeys_wandb_mode(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    assert wandb_run.choose_mode() == mode


def test_auto_obeys_wandb_offline(monkeypatch: pytest.MonkeyPatch, server: int, home: Path) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    use_server(monkeypatch, server)
    (home / "wandb").mkdir()
    subprocess.run([sys.executable, "-m", "wandb", "offline"], check=True, capture_output=True)
    assert wandb_run.choose_mode() == "offline"


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_online_falls_back_to_offline(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    server: int,
    mode: Any,
) -> None:
    use_server(monkeypatch, server)
    monkeypatch.setenv("WANDB_API_KEY", "not a key")
    tracker = open_run(TrackingConfig(mode=mode), tmp_path)
    tracker.log({"loss": 1.0}, 1)
    tracker.close()
    assert read_offline_run(tmp_path)["history"]["loss"] == [1]
    (warning,) = our_warnings(caplog)
    assert "cannot go online" in warning


def assert_goes_on(tracker: Tracker, output_dir: Path) -> None:
    for step in (1, 2, 3):
        tracker.log({"loss": float(step)}, step)
    tracker.log_images("samples", make_images(), ["", "", ""], 3)
    tracker.close()
    assert [line["loss"] for line in read_metrics(output_dir)] == [1.0, 2.0, 3.0]
    assert (output_dir / "samples" / "samples_00000003.png").exists()


@pytest.mark.parametrize("is_installed", [True, False])
def test_wandb_that_cannot_start(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_installed: bool,
) -> None:
    if is_installed:
        (tmp_path / "wandb").write_text("a file where a folder should be")
    else:
        monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = open_run(OFFLINE, tmp_path, run_id="abc")
    assert_goes_on(tracker, tmp_path)
    assert tracker.run_id == "abc"
    (warning,) = our_warnings(caplog)
    assert "W&B: cannot start" in warning
    assert ("ModuleNotFoundError" in warning) != is_installed


def test_a_refused_call_ends_wandb_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = open_run(OFFLINE, tmp_path)
    tracker.log({"early": 1.0}, 0)
    tracker.log_artifact(tmp_path / "missing", "name", "model")
    tracker.log_artifact(tmp_path / "missing", "name", "model")
    (tmp_path / "metrics.jsonl").write_text("")
    assert_goes_on(tracker, tmp_path)
    assert read_offline_run(tmp_path)["history"]["early"] == [1]
    (warning,) = our_warnings(caplog)
    assert "cannot log an artifact (ValueError" in warning


KILLED_RUN = """
import logging, os, signal, sys, time
from pathlib import Path
from PIL import Image
from dalle_mini_impl.training.tracking import TrackingConfig, open_tracker

assert "wandb" not in sys.modules
output_dir = Path(sys.argv[1])
arguments = {"output_dir": output_dir, "run_config": {}}
open_tracker(TrackingConfig(mode="disabled"), is_main=True, **arguments).close()
open_tracker(TrackingConfig(mode="offline"), is_main=False, **arguments).close()
os.environ["WANDB_MODE"] = "disabled"
open_tracker(TrackingConfig(), is_main=True, **arguments).close()
del os.environ["WANDB_MODE"]
assert "wandb" not in sys.modules

logging.basicConfig(level=logging.WARNING)
tracker = open_tracker(TrackingConfig(mode="offline"), is_main=True, **arguments)
children = [int(pid) for task in Path("/proc/self/task").iterdir()
            for pid in (task / "children").read_text().split()]
services = [pid for pid in children if Path(f"/proc/{pid}/comm").read_text() == "wandb-core\\n"]
for step in range(1, 7):
    tracker.log({"loss": float(step)}, step)
    if step == 3:
        (service,) = services
        os.kill(service, signal.SIGKILL)
    time.sleep(0.1)
tracker.log_images("samples", [Image.new("RGB", (2, 2))], ["x"], 6)
if sys.argv[2] == "close":
    tracker.close()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the process in /proc")
@pytest.mark.parametrize("ending", ["close", "no close"])
def test_a_killed_wandb_service_does_not_stop_the_run(tmp_path: Path, ending: str) -> None:
    done = run_python("-c", KILLED_RUN, tmp_path / "run", ending)
    assert done.returncode == 0, done.stderr
    assert [line["loss"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "run" / "samples" / "samples_00000006.png").exists()
    assert done.stdout == ""
    assert done.stderr.count("WARNING") == 1
    if ending == "close":
        assert len(done.stderr.splitlines()) == 1
        assert "W&B: cannot log" in done.stderr


def test_a_full_disk_costs_metrics_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = open_run(DISABLED, tmp_path)
    tracker.log({"loss": 1.0}, 1)
    with file_size_limit(60):
        tracker.log({"loss": 2.0}, 2)
        tracker.log_images("samples", make_images(), ["", "", ""], 2)
    tracker.log({"loss": 3.0}, 3)
    tracker.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    (warning,) = our_warnings(caplog)
    assert "cannot write metrics or images" in warning


def test_wandb_gets_all_metrics_of_real_runs(data: Path, tmp_path: Path) -> None:
    vqvae_dir, _ = tiny.train(tiny.vqvae_run(data, tmp_path / "vqvae", tracking="offline"))
    tiny.train(tiny.dalle_run(data, vqvae_dir, tmp_path / "dalle", tracking="offline"))

    found = read_offline_run(tmp_path / "vqvae")
    history = found["history"]
    assert history.keys() >= {*OF_EVERY_RUN.split(), *OF_A_TOKENIZER.split()}
    assert len(history["train/loss"]) == 6
    assert len(history["validation/codebook_usage"]) == 2
    assert history["reconstructions.captions"][0] == ["original", "reconstruction"] * 5
    assert history["reconstructions.count"] == [10, 10]
    assert found["config"]["vqvae"]["channels"] == [8, 12]
    assert found["config"]["training"]["max_steps"] == 6
    names = {name.split("/")[-1] for name in found["files"] if name.startswith("artifact:model/")}
    assert names >= {"config.json", "model.safetensors"}

    found = read_offline_run(tmp_path / "dalle")
    history = found["history"]
    assert history.keys() >= {*OF_EVERY_RUN.split(), *OF_A_DECODER.split()}
    assert history["samples.captions"] == [["a red disc", "a blue box"]] * 2
    images = [name for name in found["files"] if name.startswith("media/images/samples")]
    assert len(images) >= 2
    assert found["config"]["decoder"]["hidden_size"] == 16
    assert found["config"]["fixed_prompts"] == ["a red disc", "a blue box"]
    artifact = [name for name in found["files"] if name.startswith("artifact:model/")]
    assert any(name.endswith("/model_index.json") for name in artifact)
    assert any(name.endswith("/vqvae/model.safetensors") for name in artifact)

    # metrics.jsonl is the truth: W&B has every number of it.
    for row in read_metrics(tmp_path / "dalle"):
        for key in row.keys() - {"step", "time"}:
            assert row[key] in history[key], key
