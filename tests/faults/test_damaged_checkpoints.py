"""Fault test 11, and hostile checkpoints: each damage to each file is detected and named.

Every case runs on the checkpoints of a real decoder run (Muon and AdamW, averaged weights): an
older checkpoint is taken, a named one is refused, and nothing is changed.
"""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save

from dalle_mini_impl.errors import UserError
from dalle_mini_impl.training.checkpoint import (
    CheckpointCorruptError,
    load_checkpoint,
    newest_checkpoint,
)
from dalle_mini_impl.training.dalle import DalleRunConfig
from tests.faults.hostile import Bomb, damaging, entry, with_header
from tests.reference import tiny

Change = Callable[[dict[str, Any]], object]
NEWEST, OLDER = "step-00000006", "step-00000003"
FILES = (
    "manifest.json",
    "state.json",
    "model.safetensors",
    "average.safetensors",
    "optimizer_0.safetensors",
    "optimizer_1.safetensors",
)
SENTINEL = Path("code-ran")
PICKLE = pickle.dumps(Bomb(SENTINEL))


def decoder_run(folder: Path, **training: Any) -> DalleRunConfig:
    training |= {"optimizer": "muon", "ema_decay": 0.9}
    return tiny.dalle_run(folder / "data", folder / "vqvae", folder / "run", **training)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with the checkpoints of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("run")
    tiny.build_vqvae().save_pretrained(folder / "vqvae")
    tiny.write_data(folder / "data")
    tiny.train(decoder_run(folder))
    return folder


@pytest.fixture
def root(run: Path, tmp_path: Path) -> Path:
    """A copy of its checkpoints."""
    return shutil.copytree(run / "run" / "checkpoints", tmp_path / "checkpoints")


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def replace(path: Path, make: Callable[..., object], *arguments: str) -> None:
    path.unlink()
    make(path, *arguments)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "last byte lost": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "second half lost": lambda path: os.truncate(path, path.stat().st_size // 2),
    "bit flipped at the start": lambda path: flip(path, 0),
    "bit flipped in the middle": lambda path: flip(path, 0.5),
    "bit flipped at the end": lambda path: flip(path, 1),
    "a byte more": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a web page": lambda path: path.write_text("<!doctype html><title>404</title>"),
    "a pickle": lambda path: path.write_bytes(PICKLE),
    "a folder": lambda path: replace(path, Path.mkdir),
    "a dangling link": lambda path: replace(path, Path.symlink_to, "nowhere"),
    "a pipe": lambda path: replace(path, os.mkfifo),
    "an endless device": lambda path: replace(path, Path.symlink_to, "/dev/zero"),
    "that of another step": lambda path: shutil.copy(path.parents[1] / OLDER / path.name, path),
}
REASONS = ("is missing", "is not a file", "bytes, expected", "sha256", "cannot be read")


def fingerprint(root: Path) -> dict[str, Any]:
    """Every path below with its content."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else path.is_symlink()
        for path in root.rglob("*")
    }


def assert_resumes_at(root: Path, step: int) -> None:
    found = newest_checkpoint(root)
    assert found is not None
    assert found.step == step


@pytest.mark.timeout(60)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.usefixtures("here")
def test_a_damaged_file_is_named_and_passed_over(
    root: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    DAMAGES[damage](root / NEWEST / name)
    before = fingerprint(root)
    with pytest.raises(CheckpointCorruptError) as caught:
        load_checkpoint(root / NEWEST)
    message = str(caught.value)
    # A manifest of another step makes each file wrong that differs; the message names one.
    other = name == "manifest.json" and damage == "that of another step"
    assert f"{NEWEST}/" in message if other else name in message
    assert "\n" not in message
    assert any(reason in message for reason in REASONS)
    assert_resumes_at(root, 3)
    assert f"passing over checkpoint {NEWEST}" in caplog.text
    assert fingerprint(root) == before
    assert not SENTINEL.exists()


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@damaging
def set_entry(folder: Path, name: str, **values: Any) -> None:
    rewrite_manifest(folder, lambda manifest: manifest["files"][name].update(values))


@damaging
def add_file(folder: Path, name: str) -> None:
    file = {name: {"size": 1, "sha256": "0" * 64}}
    rewrite_manifest(folder, lambda manifest: manifest["files"].update(file))


@damaging
def set_manifest(folder: Path, **values: Any) -> None:
    rewrite_manifest(folder, lambda manifest: manifest.update(values))


@damaging
def write_text(folder: Path, text: str, encoding: str = "utf-8") -> None:
    (folder / "manifest.json").write_text(text, encoding=encoding)


MANIFESTS: dict[str, Callable[[Path], None]] = {
    "no version": set_manifest(format_version=None),
    "version as text": set_manifest(format_version="1"),
    "later version": set_manifest(format_version=10**30),
    "no files": set_manifest(files={}),
    "files as a list": set_manifest(files=["state.json"]),
    "files as text": set_manifest(files="state.json"),
    "entry as a number": set_manifest(files={"state.json": 3}),
    "entry without hash": set_manifest(files={"state.json": {"size": 3}}),
    "negative size": set_entry("state.json", size=-1),
    "size as text": set_entry("state.json", size="3"),
    "size without end": set_entry("state.json", size=10**400),
    "size not a number": set_entry("state.json", size=float("nan")),
    "hash as a number": set_entry("state.json", sha256=0),
    "hash as null": set_entry("state.json", sha256=None),
    "parent folder": add_file("../step-00000003/state.json"),
    "absolute path": add_file("/etc/passwd"),
    "dots": add_file(".."),
    "Windows path": add_file("..\\state.json"),
    "null byte in a name": add_file("a\0b"),
    "empty name": add_file(""),
    "name of 5,000 letters": add_file("a" * 5000),
    "lone surrogate in a name": add_file("\ud800"),
    "a list": write_text("[]"),
    "a number": write_text("1"),
    "null": write_text("null"),
    "a hundred thousand brackets": write_text("[" * 100_000),
    "nested objects": write_text('{"files":' * 50_000),
    "another encoding": write_text("{}", encoding="utf-16"),
    "a byte order mark": write_text("\ufeff{}"),
    "two objects": write_text("{}{}"),
    "a number of 10,000 digits": write_text('{"format_version": ' + "9" * 10_000 + "}"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", MANIFESTS)
def test_a_hostile_manifest_is_refused(root: Path, case: str) -> None:
    MANIFESTS[case](root / NEWEST)
    with pytest.raises(CheckpointCorruptError) as caught:
        load_checkpoint(root / NEWEST)
    assert NEWEST in str(caught.value)
    assert_resumes_at(root, 3)


@damaging
def raw(folder: Path, name: str, content: bytes) -> None:
    """Replace a file and make the manifest say that it is right."""
    (folder / name).write_bytes(content)
    fitting = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    rewrite_manifest(folder, lambda manifest: manifest["files"].update({name: fitting}))


@damaging
def forge(folder: Path, change: Change) -> None:
    """Change `state.json`."""
    content = json.loads((folder / "state.json").read_text())
    change(content)
    raw("state.json", json.dumps(content).encode())(folder)


def forge_state(change: Change) -> Callable[[Path], None]:
    """Change the run's part of it."""
    return forge(lambda content: change(content["state"]))


@damaging
def forge_tensors(folder: Path, name: str, change: Change) -> None:
    tensors = load_file(folder / name)
    change(tensors)
    raw(name, save(tensors))(folder)


def reshape_first(tensors: dict[str, Any]) -> None:
    name = max(tensors, key=lambda key: tensors[key].numel())
    tensors[name] = tensors[name].flatten()[:-1].clone()


def drop_first(tensors: dict[str, Any]) -> None:
    del tensors[min(tensors)]


def copy_first(tensors: dict[str, Any]) -> None:
    tensors["extra"] = tensors[min(tensors)].clone()


MODEL, ADAMW, MUON = FILES[2], FILES[4], FILES[5]
HUGE, BEYOND = {"w": entry([10**9, 10**9], 0, 4)}, {"w": entry([1], 0, 4 * 10**9)}
OVERLAP = {"a": entry([1], 0, 4), "b": entry([1], 0, 4)}
FORGED: dict[str, Callable[[Path], None]] = {
    "step as text": forge(lambda content: content.update(step="6")),
    "negative step": forge(lambda content: content.update(step=-1)),
    "step as a fraction": forge(lambda content: content.update(step=0.5)),
    "step as truth": forge(lambda content: content.update(step=True)),
    "no step": forge(lambda content: content.pop("step")),
    "state as a list": forge(lambda content: content.update(state=[])),
    "no state": forge(lambda content: content.pop("state")),
    "state of brackets": raw("state.json", b"[" * 100_000),
    "state is a pickle": raw("state.json", PICKLE),
    "no optimizer": forge_state(lambda state: state.pop("optimizer_0")),
    "optimizer as text": forge_state(lambda state: state.update(optimizer_0="x")),
    "optimizer as a list": forge_state(lambda state: state.update(optimizer_1=[])),
    "optimizer without groups": forge_state(lambda state: state["optimizer_0"].pop("param_groups")),
    "groups as text": forge_state(lambda state: state["optimizer_0"].update(param_groups="ab")),
    "tensor that is not there": forge_state(
        lambda state: state["optimizer_0"].update(state={"__tensor__": "none"})
    ),
    "items of nothing": forge_state(
        lambda state: state["optimizer_0"].update(state={"__items__": [1, 2]})
    ),
    "time as text": forge_state(lambda state: state.update(elapsed_seconds="later")),
    "time as a list": forge_state(lambda state: state.update(elapsed_seconds=[])),
    "skipped as null": forge_state(lambda state: state.update(skipped_in_all=None)),
    "other tokens": forge_state(lambda state: state.update(identity="other")),
    "more samples": forge_state(lambda state: state.update(num_samples=10**9)),
    "config as text": forge_state(lambda state: state.update(config="x")),
    "no config": forge_state(lambda state: state.pop("config")),
    "no samples": forge_state(lambda state: state.pop("num_samples")),
    "no evaluation": forge_state(lambda state: state.pop("evaluation_is_due")),
    "a weight missing": forge_tensors(MODEL, drop_first),
    "a weight too short": forge_tensors(MODEL, reshape_first),
    "a weight too many": forge_tensors(MODEL, copy_first),
    "a moment missing": forge_tensors(ADAMW, drop_first),
    "a moment too short": forge_tensors(ADAMW, reshape_first),
    "a momentum too short": forge_tensors(MUON, reshape_first),
    "an average missing": forge_tensors("average.safetensors", drop_first),
    "an average too short": forge_tensors("average.safetensors", reshape_first),
    "weights are a pickle": raw(MODEL, PICKLE),
    "weights of a zip file": raw(MODEL, b"PK\x03\x04" + bytes(100)),
    "header of 2^60 bytes": raw(MODEL, with_header(b"", size=2**60)),
    "header of brackets": raw(MODEL, with_header(b"[" * 100_000)),
    "shape of 10^18 weights": raw(MODEL, with_header(HUGE, bytes(4))),
    "offsets beyond the end": raw(MODEL, with_header(BEYOND, bytes(4))),
    "offsets that overlap": raw(MODEL, with_header(OVERLAP, bytes(8))),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", FORGED)
@pytest.mark.usefixtures("here")
def test_forged_checkpoints_with_valid_hashes(run: Path, root: Path, case: str, here: Path) -> None:
    """Named by `--resume`, in a whole run: one line, no code runs, nothing is written over."""
    FORGED[case](root / NEWEST)
    records = {path: path.read_bytes() for path in (run / "run").glob("*.*")}
    before = fingerprint(root)
    config = decoder_run(run, max_steps=9, checkpoint_every_steps=1000)
    with pytest.raises(UserError) as caught:
        tiny.train(config, resume=str(root / NEWEST))
    assert "\n" not in str(caught.value)
    assert NEWEST in str(caught.value)
    assert fingerprint(root) == before
    assert {path: path.read_bytes() for path in records} == records
    assert not SENTINEL.exists()


FOREIGN = {
    "empty folder": lambda root: (root / "step-00000009").mkdir(),
    "a file of that name": lambda root: (root / "step-00000009").write_text(""),
    "a link to nowhere": lambda root: (root / "step-00000009").symlink_to("nowhere"),
    "a link to itself": lambda root: (root / "step-00000009").symlink_to("step-00000009"),
    "an unfinished save": lambda root: shutil.copytree(root / NEWEST, root / ".tmp-step-9-abc"),
    "a step of 30 digits": lambda root: (root / f"step-{'9' * 30}").mkdir(),
    "no number": lambda root: (root / "step-latest").mkdir(),
    "a negative number": lambda root: (root / "step--0000001").mkdir(),
    "digits of another script": lambda root: (root / "step-٠٩").mkdir(),
    "a folder of notes": lambda root: (root / "notes").mkdir(),
    "Accelerate's checkpoint": lambda root: (root / "step_9").mkdir(),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_files_do_no_harm(root: Path, case: str) -> None:
    FOREIGN[case](root)
    assert_resumes_at(root, 6)


def test_all_damaged_starts_anew_and_says_so(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder in root.iterdir():
        flip(folder / "model.safetensors", 0.5)
    assert newest_checkpoint(root) is None
    assert caplog.text.count("passing over checkpoint") == 2
