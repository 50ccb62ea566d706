"""Parts of damaged and hostile files, and a watch that nothing came of them."""

import io
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image


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
    colour: int = 0,
    rows: bytes | None = None,
    chunks: bytes = b"",
    interlace: int = 0,
) -> bytes:
    """A PNG made by hand: its header may claim what the data do not hold.

    `rows` are the raw rows, each with its filter byte; by default next to nothing. `chunks` stand
    between the header and the data.
    """
    header = struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, interlace)
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


class Bomb:
    """Unpickling one makes a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.sentinel,)


@contextmanager
def nothing_comes_of_it(folder: Path) -> Iterator[Path]:
    """Yields the path of a file that hostile input would make; no file may appear or change."""

    def seen() -> dict[Path, tuple[int, int]]:
        stats = {path: path.lstat() for path in folder.rglob("*")}
        return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}

    before = seen()
    yield folder / "sentinel"
    assert seen() == before
