"""Faults 16, 18 and 19: no file of any size takes much memory, measured in a process of its own."""

import gzip
import json
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.hostile import add_member, damaging, png_bytes, png_chunk, png_of, tar_header
from tests.reference.commands import REPOSITORY, run_python

PROBE = REPOSITORY / "tests" / "reference" / "memory_probe.py"
GIB = 2**30
MAX_PEAK_KIB = 2**20  # 1 GiB, PyTorch and the other libraries included
SMALL_KIB = 100 * 2**10  # what is refused by its size is not read


def good(folder: Path) -> None:
    (folder / "good.png").write_bytes(png_bytes())
    (folder / "good.txt").write_text("good")


def sparse_file(path: Path, head: bytes, size: int) -> None:
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)


@damaging
def tar_with(folder: Path, name: str, kind: bytes = tarfile.REGTYPE) -> None:
    """A good sample, then a header, then 4 GiB of zeros that are there but take no disk."""
    with tarfile.open(folder / "x.tar", "w") as archive:
        add_member(archive, "a.png", png_bytes())
        add_member(archive, "a.txt", b"good")
    data = (folder / "x.tar").read_bytes()[: 4 * 512]
    sparse_file(folder / "x.tar", data + tar_header(name, GIB, kind), 4 * GIB)


@damaging
def beside_good(folder: Path, name: str, head: bytes = b"") -> None:
    good(folder)
    (folder / "big.png").write_bytes(png_bytes())
    (folder / "big.txt").write_text("big")
    sparse_file(folder / name, head, 4 * GIB)


def metadata(folder: Path) -> None:
    sparse_file(folder / "metadata.jsonl", b'{"file_name": "', 4 * GIB)


def gzip_bomb(folder: Path) -> None:
    inner = gzip.compress(bytes(2**26))
    (folder / "x.tar").write_bytes(inner * 64)  # 4 GiB


@damaging
def megapixels(folder: Path, bits: int, color: int, bytes_per_pixel: int, **options: Any) -> None:
    """An image of 49 million pixels in a few hundred kilobytes, twice."""
    width, height = 7000, 7000
    row = bytes(1 + (width * bits * bytes_per_pixel + 7) // 8)
    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    whole = png_of((width, height), bits=bits, color=color, rows=b"", **options)
    start = whole.index(b"IDAT") - 4
    data = whole[:start] + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")
    for number in range(2):
        (folder / f"{number}.png").write_bytes(data)
        (folder / f"{number}.txt").write_text("big")


TOO_LARGE_FILE = "1 read; larger than 268435456 bytes"
TOO_LARGE = "1 read; 1073741824 bytes, expected at most"
DAMAGED = "1 read; not a tar file, or damaged"
PALETTE = png_chunk(b"PLTE", bytes(768)) + png_chunk(b"tRNS", bytes(256))

# Name -> makes the folder, a part of what must come of it, and the growth allowed.
CASES: dict[str, tuple[Callable[[Path], None], str, int]] = {
    "metadata in one line of 4 GiB": (metadata, "line 1: longer than 1048576 bytes", SMALL_KIB),
    "caption file of 4 GiB": (beside_good("big.txt"), "1 read; big.txt is longer", SMALL_KIB),
    "image file of 4 GiB": (beside_good("big.png", png_bytes()), TOO_LARGE_FILE, SMALL_KIB),
    "tar with an image of 1 GiB": (tar_with("b.png"), TOO_LARGE, SMALL_KIB),
    "tar with a caption of 1 GiB": (tar_with("b.txt"), TOO_LARGE, SMALL_KIB),
    "tar with a name of 1 GiB": (tar_with("x", tarfile.GNUTYPE_LONGNAME), DAMAGED, SMALL_KIB),
    "tar with a link name of 1 GiB": (tar_with("x", tarfile.GNUTYPE_LONGLINK), DAMAGED, SMALL_KIB),
    "tar with a pax header of 1 GiB": (tar_with("x", tarfile.XHDTYPE), DAMAGED, SMALL_KIB),
    "tar with a global header of 1 GiB": (tar_with("x", tarfile.XGLTYPE), DAMAGED, SMALL_KIB),
    "tar with a sparse member of 1 GiB": (
        tar_with("b.png", tarfile.GNUTYPE_SPARSE),
        "1 read; not a regular file",
        SMALL_KIB,
    ),
    "gzip bomb of 4 GiB named tar": (gzip_bomb, "not a tar file, or damaged", SMALL_KIB),
    "49 megapixels in 1 bit": (megapixels(1, 0, 1), "2 read; ", MAX_PEAK_KIB),
    "49 megapixels in 16 bit gray": (megapixels(16, 0, 1), "2 read; ", MAX_PEAK_KIB),
    "49 megapixels in color and alpha": (megapixels(8, 6, 4), "2 read; ", MAX_PEAK_KIB),
    "49 megapixels in a palette with transparency": (
        megapixels(8, 3, 1, chunks=PALETTE),
        "2 read; ",
        MAX_PEAK_KIB,
    ),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All of them in one process, since to load the libraries takes seconds."""
    root = tmp_path_factory.mktemp("memory")
    (root / "good").mkdir()
    good(root / "good")
    folders = {name: root / str(number) for number, name in enumerate(CASES)}
    for name, folder in folders.items():
        folder.mkdir()
        CASES[name][0](folder)
    result = run_python(PROBE, root / "good", *folders.values(), timeout=580)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    for folder in folders.values():  # sparse, but not for everyone who copies them
        for path in folder.iterdir():
            path.unlink()
    return dict(zip(CASES, rows, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_memory_stays_small(name: str, measured: dict[str, dict[str, Any]]) -> None:
    _, outcome, max_growth = CASES[name]
    row = measured[name]
    assert outcome in row["outcome"]
    assert row["grown_kib"] <= max_growth
    assert row["peak_kib"] <= MAX_PEAK_KIB
