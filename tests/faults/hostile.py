"""Hostile input of all kinds: pickles that run code, files that lie about themselves.

``nothing_comes_of_it`` watches that none of them leaves a file behind.
"""

import io
import json
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
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


def torch_file(sentinel: Path, *, is_zip: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weights": Bomb(sentinel)}, buffer, _use_new_zipfile_serialization=is_zip)
    return buffer.getvalue()


def numpy_objects(sentinel: Path) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb(sentinel)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


PICKLES = {
    "pickle": pickled,
    "torch zip": partial(torch_file, is_zip=True),
    "torch legacy": partial(torch_file, is_zip=False),
    "numpy objects": numpy_objects,
}


def damaging(change: Callable[..., Any]) -> Callable[..., Callable[[Path], Any]]:
    """Turn `change(folder, ...)` into a maker of cases: `change(...)` takes the folder later."""
    return lambda *args, **options: lambda folder: change(folder, *args, **options)


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes))


def rehash(folder: Path) -> None:
    """Make the hashes fit, as a stranger would."""
    change_json(folder / INDEX_NAME, sha256=file_hashes(folder))


def tensors(folder: Path, part: str = "dalle") -> dict[str, torch.Tensor]:
    return load_file(folder / part / "model.safetensors")


def write_tensors(folder: Path, values: dict[str, torch.Tensor]) -> None:
    (folder / "dalle/model.safetensors").write_bytes(save(values))
    rehash(folder)


def with_header(head: dict[str, Any] | bytes, data: bytes = b"", size: int | None = None) -> bytes:
    """A safetensors file with any header, and any claim of its size."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    """An image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_bytes(shade: int = 0) -> bytes:
    """A small good PNG; another shade, other bytes."""
    return encoded(Image.new("RGB", (6, 4), (shade, 10, 20)), "PNG")


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk with a right checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(
    size: tuple[int, int],
    *,
    bits: int = 8,
    color: int = 0,
    rows: bytes | None = None,
    chunks: bytes = b"",
    interlace: int = 0,
) -> bytes:
    """A PNG made by hand: its header may claim what the data do not hold.

    ``rows`` are the raw rows, each with its filter byte; by default next to nothing. ``chunks``
    stand between the header and the data.
    """
    header = struct.pack(">IIBBBBB", *size, bits, color, 0, 0, interlace)
    data = zlib.compress(bytes(64) if rows is None else rows, 9)
    parts = [png_chunk(b"IHDR", header), chunks, png_chunk(b"IDAT", data), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def add_member(archive: tarfile.TarFile, name: str, data: bytes = b"", **fields: Any) -> None:
    """Add a member with any header fields."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(data))


def tar_header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """One block that claims a size, whatever follows."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


@contextmanager
def nothing_comes_of_it(folder: Path) -> Iterator[Path]:
    """Yield the path of a file that hostile input would make; no file may appear or change."""

    def seen() -> dict[Path, tuple[int, int]]:
        stats = {path: path.lstat() for path in folder.rglob("*")}
        return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}

    before = seen()
    yield folder / "sentinel"
    assert seen() == before
