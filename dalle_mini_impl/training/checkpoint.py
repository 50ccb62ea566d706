"""Checkpoints that survive a kill at any moment: safetensors and JSON in a folder, put there whole.

A checkpoint is the folder `step-00001234/`: one `<group>.safetensors` per group of tensors,
`state.json` for all that is not a tensor, and `manifest.json` with size and sha256 of each file. It
is written under a temporary name, flushed to disk and only then renamed, so a folder with the final
name is complete. The hashes catch what happens to it afterwards (safetensors has no checksum).
Nothing is ever pickled.

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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from dalle_mini_impl.errors import UserError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
STATE_NAME = "state.json"
TENSOR_SUFFIX = ".safetensors"
TEMPORARY_PREFIX = ".tmp-"
_STEP_FOLDER = re.compile(r"step-(\d+)(\.replaced)?")
_GROUP_NAME = re.compile(r"[A-Za-z0-9_-]+")


class CheckpointCorruptError(UserError):
    """A checkpoint is not what was written; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was verified and read."""

    step: int
    """Number of optimizer updates done when it was written."""
    tensors: dict[str, dict[str, Tensor]]
    """Group name -> tensor name -> CPU tensor."""
    state: dict[str, Any]
    """What `state.json` holds."""
    path: Path
    """The folder it was read from."""


def save_checkpoint(
    root: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write `root/step-<step>/` so that a kill at any moment leaves the earlier checkpoints whole.

    Afterwards all but the newest `keep` checkpoints up to `step` are deleted. Checkpoints of later
    steps (the run was rewound) are left alone, with a warning.

    Args:
        root: Folder that holds the checkpoints of one run; made if missing.
        step: Number of optimizer updates done. An existing checkpoint of this step is replaced.
        tensors: Group name (letters, digits, `_`, `-`) -> tensor name -> tensor, on any device,
            of any strides; tied tensors are stored once per name.
        state: JSON-able values. As in all JSON, tuples come back as lists and keys as strings.
        keep: How many checkpoints stay, at least 2: the newest may be the one a disk fault damages.

    Returns:
        The folder written.

    Raises:
        ValueError: An argument is out of range, or `state` is not JSON-able.
        UserError: The file system refused (full, read-only, ...). Earlier checkpoints are intact.
    """
    if keep < 2:
        raise ValueError(f"keep: got {keep}, want at least 2")
    if step < 0:
        raise ValueError(f"step: got {step}, want 0 or more")
    for group in tensors:
        if not _GROUP_NAME.fullmatch(group):
            raise ValueError(f"tensors: got group {group!r}, want letters, digits, '_' or '-' only")
    try:
        # The step lies in here, and not in the manifest, so that a hash guards it too.
        state_text = json.dumps({"step": step, "state": state}, indent=1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"state: {error}; want values that JSON can hold") from error

    final = root / f"step-{step:08d}"
    temporary = root / f"{TEMPORARY_PREFIX}{final.name}-{uuid.uuid4().hex[:8]}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for stale in root.glob(f"{TEMPORARY_PREFIX}*"):  # of killed runs; first, for the space
            _delete_folder(stale)
        _write_folder(temporary, tensors, state_text)
        _put_in_place(temporary, final)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write the checkpoint of step {step} into {root}: {error}. "
            "Earlier checkpoints there are intact."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # nothing is left of it after success
    _prune(root, step, keep)
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint folder, after every file in it has been checked against the manifest.

    Args:
        path: A `step-...` folder written by `save_checkpoint`.

    Returns:
        The checkpoint, tensors on the CPU.

    Raises:
        CheckpointCorruptError: A file is missing, unreadable or not what was written.
    """
    manifest = _read_manifest(path)
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, entry in manifest["files"].items():
        _check_file(path / name, entry, check_content=True)
    for name in manifest["files"]:
        if name.endswith(TENSOR_SUFFIX):
            try:
                tensors[name.removesuffix(TENSOR_SUFFIX)] = load_file(path / name)
            except (OSError, SafetensorError) as error:
                raise CheckpointCorruptError(f"{path / name}: cannot be read: {error}") from error
    content = _read_json(path / STATE_NAME)
    step, state = content.get("step"), content.get("state")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise CheckpointCorruptError(f"{path / STATE_NAME}: step: got {step!r}, want a count")
    if not isinstance(state, dict):
        raise CheckpointCorruptError(f"{path / STATE_NAME}: state: got {state!r}, want an object")
    return Checkpoint(step, tensors, state, path)


def newest_checkpoint(root: Path) -> Checkpoint | None:
    """Read the newest checkpoint that verifies; each one passed over is logged with the reason.

    Args:
        root: Folder that holds the checkpoints of one run; may be missing.

    Returns:
        The checkpoint, or None where there is none that can be used.
    """
    for _, path in _step_folders(root):
        try:
            return load_checkpoint(path)
        except CheckpointCorruptError as error:
            logger.warning("passing over checkpoint %s: %s", path.name, error)
    return None


def checkpoint_before(root: Path, step: int) -> Path | None:
    """Find the newest checkpoint of a step below ``step``, without reading it all.

    Args:
        root: Folder that holds the checkpoints of one run; may be missing.
        step: A number of optimizer updates.

    Returns:
        Its folder, or None where there is none.
    """
    folders = (path for found, path in _step_folders(root) if found < step)
    return next(filter(_looks_whole, folders), None)


def flatten_optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split the state of any torch optimizer into tensors and a rest that JSON can hold.

    Args:
        optimizer: AdamW, Muon, ...

    Returns:
        The tensors by name, e.g. `state.0.exp_avg` (not copies), and the JSON-able rest. A state
        that holds anything else is a ValueError.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _encode(optimizer.state_dict(), "", tensors)


def restore_optimizer_state(
    optimizer: Optimizer, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Put back what `flatten_optimizer_state` took, exactly; the tensors given are copied.

    Args:
        optimizer: A new optimizer over the same parameters in the same order.
        tensors: The first value `flatten_optimizer_state` returned.
        meta: The second one.

    Raises:
        UserError: The state does not belong to these parameters, or a part of it is missing.
    """
    try:
        saved = _decode(meta, tensors)
        optimizer.load_state_dict(saved)
        saved_keys = [key for group in saved["param_groups"] for key in group["params"]]
        _check_shapes(optimizer)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"optimizer state: does not fit this optimizer: {error}") from error
    # torch casts state to the dtype of its parameter; here it keeps the one it was saved with.
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, parameter in zip(saved_keys, parameters, strict=True):
        if key in saved["state"]:
            optimizer.state[parameter] = _uncast(optimizer.state[parameter], saved["state"][key])


def _check_shapes(optimizer: Optimizer) -> None:
    """Do what torch does not: AdamW, Muon and SGD keep numbers, and tensors like the parameter."""
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape not in {parameter.shape, torch.Size()}:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}, want {tuple(parameter.shape)}"
                )


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Make a tree JSON-able: tensors move out; tuples and dicts with int keys get a tag."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"__tensor__": name}
    prefix = f"{name}." if name else ""
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: _encode(item, prefix + key, tensors) for key, item in value.items()}
        items = [[key, _encode(item, f"{prefix}{key}", tensors)] for key, item in value.items()]
        return {"__items__": items}
    if isinstance(value, (list, tuple)):
        parts = [_encode(item, f"{prefix}{index}", tensors) for index, item in enumerate(value)]
        return {"__tuple__": parts} if isinstance(value, tuple) else parts
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"{name}: got a {type(value).__name__}, want tensors and JSON values")


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `_encode`."""
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, Mapping):
        return value
    if "__tensor__" in value:
        return tensors[value["__tensor__"]].clone()
    if "__items__" in value:
        return {key: _decode(item, tensors) for key, item in value["__items__"]}
    if "__tuple__" in value:
        return tuple(_decode(item, tensors) for item in value["__tuple__"])
    return {key: _decode(item, tensors) for key, item in value.items()}


def _uncast(loaded: Any, saved: Any) -> Any:
    """Put the saved values where torch put the loaded ones (AdamW may want `step` on the CPU)."""
    if isinstance(saved, Tensor):
        return saved.to(loaded.device)
    if isinstance(saved, Mapping):
        return {key: _uncast(loaded[key], item) for key, item in saved.items()}
    if isinstance(saved, (list, tuple)):
        return type(saved)(_uncast(old, new) for old, new in zip(loaded, saved, strict=True))
    return saved


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
        shutil.copymode(state_path, path)  # safetensors makes files that only their owner can read
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
        # No call swaps two folders everywhere, so the old one waits under a name that
        # `newest_checkpoint` still reads; `_prune` deletes it.
        replaced = final.with_name(f"{final.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
    os.replace(temporary, final)
    _flush_to_disk(final.parent)


def _prune(root: Path, step: int, keep: int) -> None:
    """Delete all but the newest `keep` whole checkpoints up to `step`."""
    kept, seen = 0, set()
    for folder_step, path in _step_folders(root):
        if folder_step > step:
            logger.warning(
                "%s is newer than step %d just saved: resuming would pick it. Delete it, or train "
                "in another folder.",
                path,
                step,
            )
        elif kept >= keep or folder_step in seen:
            _delete_folder(path)
        elif _looks_whole(path):
            kept += 1
        seen.add(folder_step)


def _delete_folder(path: Path) -> None:
    """Delete a folder; failing to is no reason to stop a run that has just saved."""
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
    """Check that all files are there with their sizes, which is cheap enough for every save."""
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
        raise CheckpointCorruptError(f"{path}: format_version {version!r}, want {FORMAT_VERSION}")
    files = manifest.get("files")
    if not isinstance(files, dict) or STATE_NAME not in files:
        raise CheckpointCorruptError(f"{path}: files: got {files!r}, want {STATE_NAME} among them")
    for name, entry in files.items():
        if Path(name).name != name or "\\" in name or "\0" in name:
            raise CheckpointCorruptError(f"{path}: file name {name!r} leads out of the folder")
        if not isinstance(entry, dict) or not {"size", "sha256"} <= entry.keys():
            raise CheckpointCorruptError(f"{path}: no size and sha256 for {name!r}")
    return manifest


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_file():  # reading a pipe would never end
            raise CheckpointCorruptError(f"{path}: is no file")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointCorruptError(f"{path}: is missing") from error
    except CheckpointCorruptError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointCorruptError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointCorruptError(f"{path}: holds a {type(value).__name__}, want an object")
    return value


def _check_file(path: Path, entry: Mapping[str, Any], *, check_content: bool) -> None:
    """Compare a file with its line in the manifest."""
    try:
        facts = path.stat()
        size = facts.st_size
        if not stat.S_ISREG(facts.st_mode):  # reading a pipe would never end
            raise CheckpointCorruptError(f"{path}: is no file")
        if size != entry["size"]:
            raise CheckpointCorruptError(f"{path}: {size} bytes, want {entry['size']}")
        if check_content and _sha256(path) != entry["sha256"]:
            raise CheckpointCorruptError(f"{path}: sha256 differs from the manifest")
    except FileNotFoundError as error:
        raise CheckpointCorruptError(f"{path}: is missing") from error
    except CheckpointCorruptError:
        raise
    except (OSError, ValueError) as error:  # a name may be none that a file can have
        raise CheckpointCorruptError(f"{path}: cannot be read: {error}") from error


def _own_cpu_copy(tensor: Tensor) -> Tensor:
    """Make a contiguous copy that shares memory with nothing, as safetensors wants it."""
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
        return  # Windows cannot open folders, and has no need to
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
