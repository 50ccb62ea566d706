"""Checkpoints come back as they were saved, in spite of kills, full disks and flipped bits."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dalle_mini_impl.errors import UserError
from dalle_mini_impl.training import checkpoint as checkpoint_module
from dalle_mini_impl.training.checkpoint import (
    CheckpointCorruptError,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from tests.reference.limits import file_size_limit


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """A folder in memory, if there is one: on a disk, these tests do little but wait for fsync."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


def save_simple(root: Path, step: int) -> Path:
    """Save a checkpoint whose every part tells its step."""
    tensors = {"model": {"weight": torch.full((5, 3), float(step))}, "ema": {}}
    return save_checkpoint(root, step, tensors=tensors, state={"marker": step})


def step_names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def assert_is_simple(root: Path, *, steps: set[int]) -> None:
    found = newest_checkpoint(root)
    assert found is not None
    assert found.step in steps
    assert found.state == {"marker": found.step}
    assert torch.equal(found.tensors["model"]["weight"], torch.full((5, 3), float(found.step)))


def test_round_trip_is_exact(tmp_path: Path) -> None:
    tied = torch.randn(4, 3)
    dtypes = [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]
    model = {
        "tied.a": tied,
        "tied.b": tied,
        "view": tied[1:],
        "transposed": torch.randn(3, 5).t(),
        "expanded": torch.randn(1, 4).expand(3, 4),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 7),
        "parameter": nn.Parameter(torch.randn(3)),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
        **{str(dtype): torch.randn(6).to(dtype) for dtype in dtypes},
    }
    state = {"run_id": "a1", "none": None, "nested": {"list": [1, 2.5, True]}, "loss": 0.1 + 0.2}
    path = save_checkpoint(tmp_path / "new" / "root", 1234, tensors={"model": model}, state=state)
    assert path == tmp_path / "new" / "root" / "step-00001234"
    assert step_names(path) == ["manifest.json", "model.safetensors", "state.json"]

    loaded = load_checkpoint(path)
    assert (loaded.step, loaded.state, loaded.path) == (1234, state, path)
    assert loaded.tensors["model"].keys() == model.keys()
    for name, tensor in model.items():
        got = loaded.tensors["model"][name]
        assert got.dtype == tensor.dtype
        assert got.shape == tensor.shape
        got, expected = (t.detach().contiguous().view(-1) for t in (got, tensor))
        assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8)), name


def test_file_modes_follow_the_umask(tmp_path: Path) -> None:
    path = save_simple(tmp_path, 1)
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": -1}, "step: got -1"),
        ({"tensors": {"../model": {}}}, "tensors: got group '../model'"),
        ({"state": {"bad": torch.zeros(1)}}, "state: "),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, arguments: Any, message: str) -> None:
    good: dict[str, Any] = {"step": 1, "tensors": {}, "state": {}}
    with pytest.raises(ValueError, match=message):
        save_checkpoint(tmp_path / "root", **good | arguments)
    assert not (tmp_path / "root").exists()


def test_newest_are_kept_and_unfinished_ones_deleted(tmp_path: Path) -> None:
    for name in ("notes", ".tmp-step-00000009-dead"):
        (tmp_path / name).mkdir()
    for step in (5, 10, 15, 20):
        save_simple(tmp_path, step)
    assert step_names(tmp_path) == ["notes", "step-00000015", "step-00000020"]
    save_simple(tmp_path, 100_000_000)
    assert_is_simple(tmp_path, steps={100_000_000})


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    for step in (1, 2):
        save_simple(tmp_path, step)
    (tmp_path / "step-00000002" / "model.safetensors").unlink()
    save_simple(tmp_path, 3)
    assert step_names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]
    save_simple(tmp_path, 4)
    assert step_names(tmp_path) == ["step-00000003", "step-00000004"]


def test_a_rewound_run_keeps_later_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (100, 200, 20, 40, 60):
        save_simple(tmp_path, step)
    kept = ["step-00000040", "step-00000060", "step-00000100", "step-00000200"]
    assert step_names(tmp_path) == kept
    assert "step-00000200 is newer than step 60" in caplog.text


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_simple(tmp_path, 6)
    save_simple(tmp_path, 7)
    path = save_checkpoint(tmp_path, 7, tensors={}, state={"marker": "again"})
    assert load_checkpoint(path).state == {"marker": "again"}
    assert step_names(tmp_path) == ["step-00000006", "step-00000007"]


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_in_any_file_is_found(memory_path: Path, data: st.DataObject) -> None:
    path = memory_path / "step-00000001"
    if not path.exists():
        save_simple(memory_path, 1)
    file = data.draw(st.sampled_from(sorted(path.iterdir())))
    original = file.read_bytes()
    content = bytearray(original)
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    with pytest.raises(CheckpointCorruptError):
        load_checkpoint(path)
    file.write_bytes(original)
    assert load_checkpoint(path).step == 1


def test_nothing_to_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert newest_checkpoint(tmp_path / "missing") is None
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / "step-latest").mkdir()
    (tmp_path / "step-00000004").write_text("a file")
    assert newest_checkpoint(tmp_path) is None
    assert len(caplog.records) == 1
    assert "step-00000003" in caplog.text
    with pytest.raises(CheckpointCorruptError, match="no such folder"):
        load_checkpoint(tmp_path / "missing")


def kill_at_event(number: int) -> None:
    """Make this (forked) process kill itself just before or after one of its file operations."""
    events = 0

    def event() -> None:
        nonlocal events
        events += 1
        if events == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            event()
            result = call(*args, **kwargs)
            event()
            return result

        return wrapped

    def half_then_whole(members: dict[str, Tensor], path: Path) -> None:
        save_file(members, path)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        event()
        path.write_bytes(content)

    save_file = checkpoint_module.save_file
    checkpoint_module.save_file = half_then_whole  # type: ignore[assignment]
    for name in ("fsync", "replace", "mkdir", "unlink", "rmdir"):
        setattr(os, name, around(getattr(os, name)))


def saves_in_a_child_killed_at(root: Path, step: int, event: int) -> bool:
    """Fork, save there, and say whether the child was killed before it had finished."""
    child = os.fork()
    if child == 0:
        kill_at_event(event)
        save_simple(root, step)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("step", [3, 2], ids=["new step", "step saved before"])
def test_a_kill_at_any_file_operation_loses_nothing(memory_path: Path, step: int) -> None:
    save_simple(memory_path / "before", 1)
    save_simple(memory_path / "before", 2)
    event, was_killed = 0, True
    while was_killed:
        event += 1
        root = memory_path / str(event)
        shutil.copytree(memory_path / "before", root)
        was_killed = saves_in_a_child_killed_at(root, step, event)
        assert_is_simple(root, steps={2, step} if was_killed else {step})
        save_simple(root, 4)
        assert_is_simple(root, steps={4})
        older, newer = (name.removesuffix(".replaced") for name in step_names(root))
        assert older in {"step-00000002", f"step-{step:08d}"}
        assert newer == "step-00000004"
    assert event > 20, "the kills did not reach the save"


def test_all_is_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recording_fsync(descriptor: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def recording_replace(source: Path, target: Path) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    save_simple(tmp_path, 1)
    calls = [name if not name.startswith(".tmp-") else "folder" for name in calls]
    assert sorted(calls[:3]) == ["ema.safetensors", "model.safetensors", "state.json"]
    assert calls[3:] == ["manifest.json", "folder", "rename", tmp_path.name]


@pytest.mark.parametrize(("num_floats", "num_letters"), [(300_000, 0), (3, 600_000)])
def test_a_failed_write_leaves_the_earlier_checkpoints(
    tmp_path: Path, num_floats: int, num_letters: int
) -> None:
    tensors, state = {"model": {"w": torch.zeros(num_floats)}}, {"long": "x" * num_letters}
    save_simple(tmp_path, 1)
    save_simple(tmp_path, 2)
    with file_size_limit(500_000), pytest.raises(UserError) as raised:
        save_checkpoint(tmp_path, 3, tensors=tensors, state=state)
    assert str(tmp_path) in str(raised.value)
    assert "File too large" in str(raised.value)
    assert step_names(tmp_path) == ["step-00000001", "step-00000002"]
    assert_is_simple(tmp_path, steps={2})


def test_a_root_that_cannot_be_a_folder_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=str(tmp_path / "file")):
        save_simple(tmp_path / "file", 1)


def test_ctrl_c_leaves_no_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    save_simple(tmp_path, 1)
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_simple(tmp_path, 2)
    assert step_names(tmp_path) == ["step-00000001"]


def test_undeletable_checkpoints_do_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        save_simple(tmp_path, step)

    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(f"no: {path}")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    save_simple(tmp_path, 3)
    assert "cannot delete the old checkpoint folder" in caplog.text
    assert_is_simple(tmp_path, steps={3})
