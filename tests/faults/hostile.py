"""What a stranger may hand over: pickles that run code, and files that lie about themselves."""

import io
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save

from dalle_mini_impl.model_folder import INDEX_NAME, file_hashes


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return Path.touch, (self.sentinel,)


def pickled(sentinel: Path) -> bytes:
    return pickle.dumps(Bomb(sentinel))


def torch_zip(sentinel: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weights": Bomb(sentinel)}, buffer)
    return buffer.getvalue()


def torch_legacy(sentinel: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weights": Bomb(sentinel)}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def numpy_objects(sentinel: Path) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb(sentinel)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


PICKLES = {
    "pickle": pickled,
    "torch zip": torch_zip,
    "torch legacy": torch_legacy,
    "numpy objects": numpy_objects,
}


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes))


def rehash(folder: Path) -> None:
    """Make the hashes fit, as a stranger would."""
    change_json(folder / INDEX_NAME, sha256=file_hashes(folder))


def rewrite(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    rehash(folder)


def tensors(folder: Path, part: str = "dalle") -> dict[str, torch.Tensor]:
    return load_file(folder / part / "model.safetensors")


def write_tensors(folder: Path, values: dict[str, torch.Tensor]) -> None:
    rewrite(folder, "dalle/model.safetensors", save(values))


def with_header(
    header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None
) -> bytes:
    """A safetensors file with a header of one's own."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
