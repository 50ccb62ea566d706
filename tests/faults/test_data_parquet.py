"""Faults 17 to 19 for parquet: wrong columns and types, damage, files that unpack to a disk."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dalle_mini_impl.data.images import BadImageError
from dalle_mini_impl.data.loading import decode_to_fit
from dalle_mini_impl.data.pairs import open_pairs
from dalle_mini_impl.errors import UserError
from tests.faults.hostile import Bomb, nothing_comes_of_it, png_bytes


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder))


def write(path: Path, columns: dict[str, Any], **options: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, **options)


def whole(folder: Path) -> bytes:
    write(folder / "x.parquet", {"image": [png_bytes()] * 9, "text": ["x"] * 9})
    return (folder / "x.parquet").read_bytes()


def damaged(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / "x.parquet").write_bytes(change(whole(folder)))


def columns(**values: Any) -> Callable[[Path], object]:
    return lambda folder: write(folder / "x.parquet", values)


CANNOT = r"cannot read .*x\.parquet as parquet: "

NO_TEXT = "no captioned images found.*text is empty, null"

# Name -> writes x.parquet, and the error.
ERRORS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty file": (lambda folder: (folder / "x.parquet").touch(), CANNOT),
    "text": (lambda folder: (folder / "x.parquet").write_text("a,b\n"), CANNOT),
    "cut in the middle": (damaged(lambda data: data[: len(data) // 2]), CANNOT),
    "cut at the end": (damaged(lambda data: data[:-1]), CANNOT),
    "footer length of 4 GB": (damaged(lambda data: data[:-8] + b"\xff" * 4 + b"PAR1"), CANNOT),
    "footer of zeros": (damaged(lambda data: data[:-60] + bytes(52) + data[-8:]), CANNOT),
    "no image column": (columns(text=["x"]), r"no column 'image' for images, but \['text'\]"),
    "no caption column": (
        columns(image=[png_bytes()], label=["x"]),
        r"none of the columns text, .* for captions, but \['image', 'label'\]",
    ),
    "images that are numbers": (columns(image=[1, 2], text=["x", "y"]), "column 'image'"),
    "captions that are numbers": (columns(image=[png_bytes()], text=[3]), NO_TEXT),
    "captions that are bytes": (columns(image=[png_bytes()], text=[b"x"]), "no captioned images"),
    "no rows": (columns(image=[png_bytes()][:0], text=["x"][:0]), CANNOT),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_bad_table_is_one_error(name: str, tmp_path: Path) -> None:
    make, message = ERRORS[name]
    make(tmp_path)
    with nothing_comes_of_it(tmp_path):
        with pytest.raises(UserError, match=message) as caught:
            open_pairs(str(tmp_path / "x.parquet"))
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_kilobytes_that_unpack_to_a_gigabyte_are_refused(tmp_path: Path) -> None:
    """20 images of 64 MiB of zeros."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    block, path = pa.table({"image": [bytes(2**26)], "text": ["x"]}), tmp_path / "x.parquet"
    options = {"compression": "zstd", "use_dictionary": False}
    with pq.ParquetWriter(path, block.schema, **options) as writer:
        for _ in range(20):
            writer.write_table(block)
    with pytest.raises(UserError, match=r"x\.parquet: \d+ bytes that unpack to 1\d{9} in 20 rows"):
        open_pairs(str(tmp_path / "x.parquet"))


# Name -> the image's value in a row, and the reason for which it is left out.
ROWS: dict[str, tuple[Any, str]] = {
    "null": (None, "no image in column image"),
    "no bytes": ({"bytes": b"", "path": None}, "no image in column image"),
    "absolute path": ({"bytes": None, "path": "/etc/passwd"}, "no image in column image"),
    "parent folder": ({"bytes": None, "path": "../secret.png"}, "no image in column image"),
    "link outside": ({"bytes": None, "path": "link.png"}, "no image in column image"),
    "url": ({"bytes": None, "path": "http://127.0.0.1:9/a.png"}, "no image in column image"),
    "missing file": ({"bytes": None, "path": "gone.png"}, "no image in column image"),
    "web page": ({"bytes": b"<html>", "path": None}, "not an image"),
    "pickle": ({"bytes": pickle.dumps(Bomb(Path("sentinel"))), "path": "a.pkl"}, "not an image"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_is_skipped_or_refused(name: str, here: Path) -> None:
    value, reason = ROWS[name]
    folder = here / "folder"
    folder.mkdir()
    (here / "secret.png").write_bytes(png_bytes())
    (folder / "link.png").symlink_to(here / "secret.png")
    images = [value, {"bytes": png_bytes(), "path": None}]
    write(folder / "x.parquet", {"image": images, "text": ["bad", "good"]})
    with nothing_comes_of_it(here):
        pairs = open_pairs(str(folder / "x.parquet"))
        if len(pairs) == 1:
            [record] = pairs.skipped
            assert (record.path, record.reason) == ("row 0", reason)
        else:
            with pytest.raises(BadImageError, match=f"^row 0: {reason}"):
                decode_to_fit(pairs.read_image(0), pairs[0].path, (4, 4))
        assert pairs[-1].captions == ("good",)
        assert decode_to_fit(pairs.read_image(-1), "x", (4, 4)).size == (4, 4)


@pytest.mark.timeout(30)  # a pipe that is opened hangs
def test_a_pipe_among_parquet_files_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").mkdir()
    with pytest.raises(UserError, match="no captioned images found"):
        open_pairs(str(tmp_path))
    write(tmp_path / "c.parquet", {"image": [png_bytes()], "text": ["x"]})
    assert len(open_pairs(str(tmp_path))) == 1
