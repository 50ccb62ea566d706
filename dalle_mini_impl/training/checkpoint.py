"""Checkpoints that survive a kill at any moment: safetensors and JSON in a folder, put there whole.

A checkpoint is the folder `step-00001234/`: one `<group>.safetensors` per group of tensors,
`state.json` for everything else, and `manifest.json` with size and sha256 of each file. It is
written under a temporary name, flushed to disk and only then renamed, so a folder with the final
name is complete. The hashes catch later damage (safetensors has no checksum). Nothing is ever
pickled.

One process writes into a root; the others wait. This module knows no model.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dalle_mini_impl.errors import UserError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
STATE_NAME = "state.json"
TENSOR_SUFFIX = ".safetensors"
TEMPORARY_PREFIX = ".tmp-"
NUM_KEPT = 2  # at least 2: the newest may be the one that a disk fault damages
_STEP_FOLDER = re.compile(r"step-(\d+)(\.replaced)?")
_GROUP_NAME = re.compile(r"[A-Za-z0-9_-]+")


class CheckpointCorruptError(UserError):
    """A checkpoint is damaged; the message names the file and the damage."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    """Group name -> tensor name -> CPU tensor."""
    state: dict[str, Any]
    path: Path


def save_checkpoint(
    root: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
) -> Path:
    """Write `root/step-<step>/` so that a kill at any moment leaves the earlier checkpoints whole.

    Afterwards all but the newest two checkpoints up to `step` are deleted. Checkpoints of later
    steps (the run was rewound) are left alone, with a warning.

    Args:
        root: Folder of a run's checkpoints; made if missing.
        step: Optimizer updates done. An existing checkpoint of this step is replaced.
        tensors: Group name (letters, digits, `_`, `-`) -> tensor name -> tensor, on any device,
            of any strides; tied tensors are stored once per name.
        state: JSON-able values. As in all JSON, tuples come back as lists and keys as strings.

    Returns:
        The folder written.

    Raises:
        ValueError: An argument is out of range, or `state` is not JSON-able.
        UserError: The file system refused (full, read-only, ...). Earlier checkpoints are intact.
    """
    if step < 0:
        raise ValueError(f"step: got {step}, expected 0 or more")
    for group in tensors:
        if not _GROUP_NAME.fullmatch(group):
            raise ValueError(f"tensors: got group {group!r}, expected letters, digits, '_', '-'")
    try:
        # The step stands here and not in the manifest, so that a hash guards it too.
        state_text = json.dumps({"step": step, "state": state}, indent=1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"state: {error}; expected values that JSON can hold") from error

    final = root / f"step-{step:08d}"
    temporary = root / f"{TEMPORARY_PREFIX}{final.name}-{uuid.uuid4().hex[:8]}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        # 1. Delete what killed saves left: its space may be needed now.
        for stale in root.glob(f"{TEMPORARY_PREFIX}*"):
            _delete_folder(stale)
        # 2. Write and flush everything under a temporary name: a kill leaves no half checkpoint.
        _write_folder(temporary, tensors, state_text)
        # 3. Rename. From here on the new checkpoint counts.
        _put_in_place(temporary, final)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write the checkpoint of step {step} into {root}: {error}. "
            "Earlier checkpoints there are intact."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # nothing is left of it after success
    # 4. Only now delete older ones: at every moment a whole checkpoint exists.
    _prune(root, step)
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """Check every file of a checkpoint folder against the manifest, then read it.

    Raises:
        CheckpointCorruptError: A file is missing, unreadable or damaged.
    """
    manifest = _read_manifest(path)
    tensors: dict[str, dict[str, Tensor]] = {}
    # All hashes first: damage is found before any parser sees it.
    for name, entry in manifest["files"].items():
        _check_file(path / name, entry, check_content=True)
    for name in manifest["files"]:
        if name.endswith(TENSOR_SUFFIX):
            with _errors_named(path / name):
                tensors[name.removesuffix(TENSOR_SUFFIX)] = load_file(path / name)
    content = _read_json(path / STATE_NAME)
    step, state = content.get("step"), content.get("state")
    # Right hashes do not make a right checkpoint: somebody may have written both.
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise CheckpointCorruptError(f"{path / STATE_NAME}: step: got {step!r}, expected a count")
    if not isinstance(state, dict):
        raise CheckpointCorruptError(
            f"{path / STATE_NAME}: state: got {state!r}, expected an object"
        )
    return Checkpoint(step, tensors, state, path)


def newest_checkpoint(root: Path) -> Checkpoint | None:
    """Read the newest checkpoint that verifies; damaged ones are logged with the reason.

    None if there is none, or no folder `root`.
    """
    for _, path in _step_folders(root):
        try:
            return load_checkpoint(path)
        except CheckpointCorruptError as error:
            logger.warning("passing over checkpoint %s: %s", path.name, error)
    return None


def checkpoint_before(root: Path, step: int) -> Path | None:
    """Find the folder of the newest checkpoint below a step, without reading its contents."""
    folders = (path for found, path in _step_folders(root) if found < step)
    return next(filter(_looks_whole, folders), None)


def _write_folder(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state_text: str
) -> None:
    """Write all files of a checkpoint and flush them to disk, the manifest last."""
    folder.mkdir()
    state_path = folder / STATE_NAME
    state_path.write_text(state_text, encoding="utf-8")
    for group, members in tensors.items():
        path = folder / f"{group}{TENSOR_SUFFIX}"
        save_file({name: _own_cpu_copy(tensor) for name, tensor in members.items()}, path)
        # safetensors makes files that only their owner can read.
        shutil.copymode(state_path, path)
    # The manifest vouches for the other files, so these are on disk before it exists.
    files = {}
    for path in sorted(folder.iterdir()):
        _flush_to_disk(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    manifest = {"format_version": FORMAT_VERSION, "files": files}
    manifest_path = folder / MANIFEST_NAME
    manifest_path.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _flush_to_disk(manifest_path)
    _flush_to_disk(folder)


def _put_in_place(temporary: Path, final: Path) -> None:
    """Give the finished folder its name; an older one of that name stays readable meanwhile."""
    if final.exists():
        # No portable call swaps two folders, so the old one waits under a name that
        # `newest_checkpoint` still reads; `_prune` deletes it.
        replaced = final.with_name(f"{final.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
    os.replace(temporary, final)
    _flush_to_disk(final.parent)


def _prune(root: Path, step: int) -> None:
    """Delete all but the newest whole checkpoints up to `step`."""
    kept, seen = 0, set()
    for folder_step, path in _step_folders(root):
        if folder_step > step:
            logger.warning(
                "%s is newer than step %d just saved: resuming would pick it. Delete it, or train "
                "in another folder.",
                path,
                step,
            )
        # A second folder of a step is the one that a newer save has replaced.
        elif kept >= NUM_KEPT or folder_step in seen:
            _delete_folder(path)
        elif _looks_whole(path):
            kept += 1
        seen.add(folder_step)


def _delete_folder(path: Path) -> None:
    """Delete a folder; a failure is no reason to stop a run that has just saved."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        logger.warning("cannot delete the old checkpoint folder %s: %s", path, error)


def _step_folders(root: Path) -> list[tuple[int, Path]]:
    """All (step, folder) under `root`, newest first; a replaced one after its replacement."""
    if not root.is_dir():
        return []
    found = [
        (int(match[1]), match[2] is None, path)
        for path in root.iterdir()
        if path.is_dir() and (match := _STEP_FOLDER.fullmatch(path.name))
    ]
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def _looks_whole(path: Path) -> bool:
    """Check that all files exist with their sizes, which is cheap enough for every save."""
    try:
        for name, entry in _read_manifest(path)["files"].items():
            _check_file(path / name, entry, check_content=False)
    except CheckpointCorruptError:
        return False
    return True


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Read `manifest.json` and check its form; a manifest is input from outside like any other."""
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise CheckpointCorruptError(f"{folder}: no such folder")
    manifest = _read_json(path)
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointCorruptError(
            f"{path}: format_version {version!r}, expected {FORMAT_VERSION}"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or STATE_NAME not in files:
        raise CheckpointCorruptError(
            f"{path}: files: got {files!r}, expected {STATE_NAME} among them"
        )
    # Names are paths from outside: none may reach another folder, on any system.
    for name, entry in files.items():
        # Without control codes and half characters, which no terminal or log can take.
        if Path(name).name != name or "\\" in name or not name.isprintable():
            raise CheckpointCorruptError(
                f"{path}: got file name {name!r}, expected the name of a file in the folder"
            )
        if not isinstance(entry, dict) or not {"size", "sha256"} <= entry.keys():
            raise CheckpointCorruptError(f"{path}: no size and sha256 for {name!r}")
    return manifest


def _read_json(path: Path) -> dict[str, Any]:
    with _errors_named(path):
        if path.exists() and not path.is_file():  # reading a pipe would never end
            raise CheckpointCorruptError(f"{path}: is not a file")
        value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise CheckpointCorruptError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value


def _check_file(path: Path, entry: Mapping[str, Any], *, check_content: bool) -> None:
    """Compare a file with its line in the manifest."""
    with _errors_named(path):
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):  # reading a pipe would never end
            raise CheckpointCorruptError(f"{path}: is not a file")
        # Size first: it is free, and a later read needs no more memory than was written.
        if facts.st_size != entry["size"]:
            raise CheckpointCorruptError(f"{path}: {facts.st_size} bytes, expected {entry['size']}")
        if check_content and _sha256(path) != entry["sha256"]:
            raise CheckpointCorruptError(f"{path}: sha256 differs from the manifest")


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    """Turn each error of reading a file into one that names the file."""
    try:
        yield
    except CheckpointCorruptError:
        raise
    except FileNotFoundError as error:
        raise CheckpointCorruptError(f"{path}: is missing") from error
    # ValueError: no JSON, no UTF-8, or a name that no file can have.
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointCorruptError(f"{path}: cannot be read: {error}") from error


def _own_cpu_copy(tensor: Tensor) -> Tensor:
    """Make a contiguous copy that shares memory with nothing, as safetensors requires."""
    return tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _flush_to_disk(path: Path) -> None:
    """Call fsync on a file, or on a folder (which makes the names in it durable)."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders, and need not
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
