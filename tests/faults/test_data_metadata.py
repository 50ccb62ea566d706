"""Fault 18: metadata and caption files as hostile or careless hands write them."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dalle_mini_impl.data.pairs import open_pairs
from dalle_mini_impl.errors import UserError
from tests.faults.hostile import damaging, nothing_comes_of_it, png_bytes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good image a.png; secrets and ways to them beside the folder."""
    (tmp_path / "secret.png").write_bytes(png_bytes())
    (tmp_path / "secret.txt").write_text("secret")
    inside = tmp_path / "images"
    inside.mkdir()
    (inside / "a.png").write_bytes(png_bytes())
    (inside / "b.png").write_bytes(png_bytes(1))
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    (inside / "linked").symlink_to(tmp_path)
    (inside / "loop.png").symlink_to(inside / "loop.png")
    (inside / "within.png").symlink_to(inside / "a.png")
    (inside / "folder.png").mkdir()
    os.mkfifo(inside / "fifo.png")
    return inside


def row(**fields: Any) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode()


def named(name: str) -> bytes:
    return json.dumps({"file_name": name, "text": "x"}).encode()


def nested(depth: int) -> bytes:
    values = b"[" * depth + b"]" * depth
    return b'{"file_name": "a.png", "text": "x", "n": ' + values + b"}"


OUT = r"file_name .* leads out of the folder"
NOT_JSON = r"not valid JSON \("

# Second line of a metadata.jsonl -> the error that names this line.
ERRORS: dict[str, tuple[bytes, str]] = {
    "cut off": (b'{"file_name": "b.png", "text": ', NOT_JSON),
    "csv": (b"b.png,a red cup", NOT_JSON),
    "python": (b"{'file_name': 'b.png', 'text': 'x'}", NOT_JSON),
    "two objects in a line": (named("b.png") * 2, NOT_JSON),
    "list": (b'["b.png", "x"]', "a JSON list, expected an object"),
    "number": (b"7", "a JSON int, expected an object"),
    "null": (b"null", "a JSON NoneType, expected an object"),
    "latin-1": ('{"file_name": "b.png", "text": "café"}'.encode("latin-1"), NOT_JSON),
    "utf-16": ('{"file_name": "b.png", "text": "x"}'.encode("utf-16"), NOT_JSON),
    "pickle": (b"\x80\x04cos\nsystem\n(S'touch sentinel'\ntR.", NOT_JSON),
    "nul bytes": (bytes(100), NOT_JSON),
    "5 000 digits": (b'{"file_name": "b.png", "n": ' + b"9" * 5000 + b"}", NOT_JSON),
    "100 000 brackets": (b"[" * 100_000, NOT_JSON),
    "nested 500 deep": (nested(500), "nested deeper than 64"),
    "longer than 1 MiB": (row(file_name="b.png", text="x" * 2**20), "longer than 1048576 bytes"),
    "zeros longer than 1 MiB": (bytes(2**20 + 1), "longer than 1048576 bytes"),
    "no file name": (b'{"text": "x"}', "file_name is None"),
    "empty file name": (named(""), "file_name is ''"),
    "number as file name": (b'{"file_name": 3, "text": "x"}', "file_name is 3"),
    "list as file name": (b'{"file_name": ["b.png"], "text": "x"}', "file_name is "),
    "half a surrogate pair as file name": (named("\ud800.png"), "file_name is"),
    "nul in the file name": (named("b\0.png"), OUT),
    "parent folder": (named("../secret.png"), OUT),
    "parent folder further in": (named("sub/../../secret.png"), OUT),
    "parent folder of windows": (named("..\\secret.png"), OUT),
    "absolute path": (named("/etc/passwd"), OUT),
    "drive": (named("C:\\secret.png"), OUT),
    "drive without root": (named("C:secret.png"), OUT),
    "share": (named("\\\\server\\share\\secret.png"), OUT),
    "link to a file outside": (named("link.png"), OUT),
    "link to a folder outside": (named("linked/secret.png"), OUT),
    "one image in two splits": (
        row(file_name="a.png", text="x", split="val"),
        r"a\.png is in split 'val', but in None above",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_bad_line_is_an_error_with_its_number(name: str, folder: Path) -> None:
    line, message = ERRORS[name]
    (folder / "metadata.jsonl").write_bytes(named("a.png") + b"\n" + line + b"\n")
    with nothing_comes_of_it(folder.parent):
        with pytest.raises(UserError, match=rf"metadata\.jsonl, line 2: {message}") as caught:
            open_pairs(str(folder))
        assert len(str(caught.value)) < 20_000


NO_TEXT = "text is empty, null, too long or not text"
MISSING = "the image file is missing"

# Second line -> the reason for which its record is left out.
SKIPPED: dict[str, tuple[bytes, str]] = {
    "null caption": (row(file_name="b.png", text=None), NO_TEXT),
    "empty caption": (row(file_name="b.png", text=""), NO_TEXT),
    "blank caption": (row(file_name="b.png", text=" \t\n\u00a0"), NO_TEXT),
    "number as caption": (row(file_name="b.png", text=7), NO_TEXT),
    "object as caption": (row(file_name="b.png", text={"en": "x"}), NO_TEXT),
    "empty list of captions": (row(file_name="b.png", text=[]), NO_TEXT),
    "list of nothing": (row(file_name="b.png", text=[None, "", 3]), NO_TEXT),
    "half a surrogate pair": (b'{"file_name": "b.png", "text": "\\ud800"}', NO_TEXT),
    "no caption field": (row(file_name="b.png", label="x"), "none of the fields text, "),
    "missing image": (named("gone.png"), MISSING),
    "image in a missing folder": (named("gone/b.png"), MISSING),
    "the folder itself": (named("."), MISSING),
    "folder named as an image": (named("folder.png"), MISSING),
    "pipe named as an image": (named("fifo.png"), MISSING),
    "link to itself": (named("loop.png"), MISSING),
    "name of 5 000 letters": (named("z" * 5000 + ".png"), MISSING),
    "url": (named("https://example.com/b.png"), MISSING),
    "command": (named("pipe:touch sentinel"), MISSING),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_an_unusable_record_is_skipped_with_its_reason(name: str, folder: Path) -> None:
    line, reason = SKIPPED[name]
    (folder / "metadata.jsonl").write_bytes(line + b"\n" + named("a.png") + b"\n")
    with nothing_comes_of_it(folder.parent):
        pairs = open_pairs(str(folder))
        assert [pair.path for pair in pairs] == ["a.png"]
        [skipped] = pairs.skipped
        assert reason in skipped.reason


HTML = "<img onerror=alert(1)>"

# Whole file -> the captions that are read from it.
ACCEPTED: dict[str, tuple[bytes, list[tuple[str, ...]]]] = {
    "byte order mark": (b"\xef\xbb\xbf" + named("a.png"), [("x",)]),
    "windows line ends": (named("a.png") + b"\r\n" + named("b.png") + b"\r\n", [("x",), ("x",)]),
    "blank lines": (b"\n \n" + named("a.png") + b"\n\n", [("x",)]),
    "no line end": (named("a.png"), [("x",)]),
    "one image twice": (named("a.png") + b"\n" + row(file_name="a.png", text="y"), [("x", "y")]),
    "one line twice": (named("a.png") + b"\n" + named("a.png"), [("x",)]),
    "one key twice": (b'{"file_name": "a.png", "text": "x", "text": "y"}', [("y",)]),
    "captions repeated": (row(file_name="a.png", text=["x", " x ", "x\n"]), [("x",)]),
    "caption of 100 kB": (row(file_name="a.png", text="x" * 100_000), [("x" * 100_000,)]),
    "caption with nul": (row(file_name="a.png", text="a\0b"), [("a\0b",)]),
    "caption from right to left": (row(file_name="a.png", text="\u202eevil"), [("\u202eevil",)]),
    "caption in hebrew": (row(file_name="a.png", text="לב אדום"), [("לב אדום",)]),
    "caption of emoji": (row(file_name="a.png", text="👩🏽‍🚒🇰🇷"), [("👩🏽‍🚒🇰🇷",)]),
    "caption with terminal codes": (row(file_name="a.png", text="\x1b[2Jx"), [("\x1b[2Jx",)]),
    "caption with html": (row(file_name="a.png", text=HTML), [(HTML,)]),
    "caption over three lines": (row(file_name="a.png", text="a\r\nb\u2028c"), [("a b c",)]),
    "special token as caption": (row(file_name="a.png", text="<pad>"), [("<pad>",)]),
    "nan among the attributes": (b'{"file_name": "a.png", "text": "x", "n": NaN}', [("x",)]),
    "nested 50 deep": (nested(50), [("x",)]),
    "link within the folder": (named("within.png"), [("x",)]),
    "name with a dot folder": (named("./a.png"), [("x",)]),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_odd_but_usable_file_is_read(name: str, folder: Path) -> None:
    data, captions = ACCEPTED[name]
    (folder / "metadata.jsonl").write_bytes(data)
    with nothing_comes_of_it(folder.parent):
        pairs = open_pairs(str(folder))
        assert [pair.captions for pair in pairs] == captions
        assert pairs.skipped == []
        assert all(pairs.read_image(index) for index in range(len(pairs)))


# Bytes of a caption file -> its captions, or the reason for which the image is left out.
CAPTION_FILES: dict[str, tuple[bytes, tuple[str, ...] | str]] = {
    "utf-8 with byte order mark": ("\ufeff하트".encode(), ("하트",)),
    "windows line ends": (b"one\r\ntwo\r\n", ("one", "two")),
    "old mac line ends": (b"one\rtwo", ("one two",)),
    "form feeds and separators": ("a\f b\x1c\u2029 c".encode(), ("a b c",)),
    "nul": (b"a\0b", ("a\0b",)),
    "right to left": ("\u202ex".encode(), ("\u202ex",)),
    "one line twice": (b"x\nx\n x ", ("x",)),
    "exactly 1 MiB": (b"x" * 2**20, ("x" * 2**20,)),
    "longer than 1 MiB": (b"x" * (2**20 + 1), "a.txt is longer than 1048576 bytes"),
    "empty": (b"", "no caption: a.txt is empty"),
    "byte order mark alone": (b"\xef\xbb\xbf", "no caption: a.txt is empty"),
    "blank": (b" \n\t\n\xc2\xa0", "no caption: a.txt is empty"),
    "latin-1": ("café".encode("latin-1"), "not UTF-8 text (byte 3)"),
    "windows-1252": ("“x”".encode("cp1252"), "not UTF-8 text (byte 0)"),
    "utf-16": ("하트".encode("utf-16"), "not UTF-8 text (byte 0)"),
    "utf-32": ("하트".encode("utf-32"), "not UTF-8 text (byte 0)"),
    "euc-kr": ("하트".encode("euc-kr"), "not UTF-8 text (byte 0)"),
    "shift-jis": ("赤".encode("shift-jis"), "not UTF-8 text (byte 0)"),
    "gb18030": ("红".encode("gb18030"), "not UTF-8 text (byte 0)"),
    "half a surrogate pair": (b"x\xed\xa0\x80", "not UTF-8 text (byte 1)"),
    "overlong form": (b"\xc0\xaf", "not UTF-8 text (byte 0)"),
    "pickle": (b"\x80\x04cos\nsystem\n(S'touch sentinel'\ntR.", "not UTF-8 text (byte 0)"),
    "image": (png_bytes(), "not UTF-8 text (byte 0)"),
}


@pytest.mark.parametrize("name", CAPTION_FILES)
def test_caption_file_is_read_or_its_image_skipped(name: str, tmp_path: Path) -> None:
    data, outcome = CAPTION_FILES[name]
    for stem in ("a", "good"):
        (tmp_path / f"{stem}.png").write_bytes(png_bytes())
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "good.txt").write_text("good")
    with nothing_comes_of_it(tmp_path):
        pairs = open_pairs(str(tmp_path))
        found = {pair.path: pair.captions for pair in pairs}
        reasons = {record.path: record.reason for record in pairs.skipped}
    assert found.pop("good.png") == ("good",)
    if isinstance(outcome, tuple):
        assert (found, reasons) == ({"a.png": outcome}, {})
    else:
        assert found == {}
        assert list(reasons) == ["a.png"]
        assert outcome in reasons["a.png"]


@damaging
def made(folder: Path, name: str, make: Callable[..., object], *arguments: Any) -> None:
    make(folder / name, *arguments)


NO_FILE = "no file a.txt beside it"
# What lies in a folder of images with text files -> why a.png is left out (b.png is kept).
FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "caption that links outside": (
        made("a.txt", Path.symlink_to, "../secret.txt"),
        "is a link that leads out of the folder",
    ),
    "caption that links to itself": (made("a.txt", Path.symlink_to, "a.txt"), "a.txt"),
    "caption that is a pipe": (made("a.txt", os.mkfifo), NO_FILE),
    "caption that is a folder": (made("a.txt", Path.mkdir), NO_FILE),
    "no caption": (lambda folder: None, NO_FILE),
    "hidden files": (made(".b.txt", Path.write_text, "x"), NO_FILE),
    "metadata that is a folder": (made("metadata.jsonl", Path.mkdir), NO_FILE),
    "metadata that is a pipe": (made("metadata.jsonl", os.mkfifo), NO_FILE),
    "tar that is a pipe": (made("x.tar", os.mkfifo), NO_FILE),
}


@pytest.mark.timeout(30)  # a pipe that is opened hangs
@pytest.mark.parametrize("name", FOLDERS)
def test_odd_things_in_a_folder_are_passed_over(name: str, folder: Path) -> None:
    make, reason = FOLDERS[name]
    (folder / "within.png").unlink()
    (folder / "b.txt").write_text("good")
    make(folder)
    with nothing_comes_of_it(folder.parent):
        pairs = open_pairs(str(folder))
        assert [pair.path for pair in pairs] == ["b.png"]
        reasons = {record.path: record.reason for record in pairs.skipped}
    assert reason in reasons["a.png"]


def test_no_depth_of_folders_stops_the_search(tmp_path: Path) -> None:
    bottom = tmp_path
    try:
        for _ in range(1100):  # more than Python recurses
            bottom /= "d"
            bottom.mkdir()
        (bottom / "a.png").write_bytes(png_bytes())
        (bottom / "a.txt").write_text("deep")
        [pair] = open_pairs(str(tmp_path))
        assert pair.captions == ("deep",)
        (bottom / "a.txt").unlink()
        with pytest.raises(UserError, match="no captioned images found"):
            open_pairs(str(tmp_path))
    finally:  # pytest's own tidying recurses
        subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)
