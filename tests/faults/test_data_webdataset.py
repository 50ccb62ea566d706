"""Fault 19: tars that would write elsewhere, run code, fill the memory, or are damaged."""

import bz2
import gzip
import io
import lzma
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dalle_mini_impl.data.pairs import open_pairs
from dalle_mini_impl.errors import UserError
from tests.faults.hostile import Bomb, add_member, nothing_comes_of_it, png_bytes, tar_header

Build = Callable[[tarfile.TarFile], object]


def file(name: str, data: bytes = b"x", **fields: Any) -> Build:
    return lambda archive: add_member(archive, name, data, **fields)


def both(*builds: Build) -> Build:
    return lambda archive: [build(archive) for build in builds]


def special(kind: bytes, linkname: str = "", name: str = "b.png") -> Build:
    return file(name, b"", type=kind, linkname=linkname, devmajor=1, devminor=5)


def sparse(**fields: str) -> Build:
    headers = {f"GNU.sparse.{name}": value for name, value in fields.items()}
    return file("b.png", b"", pax_headers=headers)


IMAGE = file("b.png", png_bytes())
PICKLED = pickle.dumps(Bomb(Path("sentinel")))
OUTSIDE = "its name leads out of the archive"
NOT_REGULAR = "not a regular file (link, device or sparse file)"
NO_CAPTION = "no .txt or .json for this key, or an empty one"

# Name -> members put before a good sample, and what is said of the key (nothing: passed over).
MEMBERS: dict[str, tuple[Build, dict[str, str]]] = {
    "parent folder": (file("../b.png", png_bytes()), {"../b.png": OUTSIDE}),
    "parent folder further in": (file("s/../../b.png", png_bytes()), {"s/../../b.png": OUTSIDE}),
    "parent folder of windows": (file("s\\..\\..\\b.png", png_bytes()), {"b.png": OUTSIDE}),
    "hidden parent folder of windows": (file("..\\b.png", png_bytes()), {}),
    "absolute name": (file("/tmp/b.png", png_bytes()), {"/tmp/b.png": OUTSIDE}),
    "drive": (file("C:\\b.png", png_bytes()), {"C:\\b.png": OUTSIDE}),
    "share": (file("\\\\host\\b.png", png_bytes()), {"\\\\host\\b.png": OUTSIDE}),
    "caption in the parent folder": (file("../b.txt"), {"../b.txt": OUTSIDE}),
    "outside name in pax": (file("b.png", pax_headers={"path": "../b.png"}), {"../b.png": OUTSIDE}),
    "symbolic link to a file": (special(tarfile.SYMTYPE, "/etc/passwd"), {"b.png": NOT_REGULAR}),
    "symbolic link as caption": (
        both(IMAGE, special(tarfile.SYMTYPE, "/etc/passwd", "b.txt")),
        {"b.txt": NOT_REGULAR, "b.png": NO_CAPTION},
    ),
    "symbolic link to a folder, and a file below it": (
        both(special(tarfile.SYMTYPE, "/tmp", "s"), file("s/b.png", png_bytes())),
        {"s/b.png": NO_CAPTION},
    ),
    "hard link outside": (special(tarfile.LNKTYPE, "/etc/passwd"), {"b.png": NOT_REGULAR}),
    "hard link to another member": (special(tarfile.LNKTYPE, "good.png"), {"b.png": NOT_REGULAR}),
    "character device": (special(tarfile.CHRTYPE), {"b.png": NOT_REGULAR}),
    "block device": (special(tarfile.BLKTYPE), {"b.png": NOT_REGULAR}),
    "pipe": (special(tarfile.FIFOTYPE), {"b.png": NOT_REGULAR}),
    "folder named as an image": (special(tarfile.DIRTYPE), {}),
    **{
        f"pickle as .{suffix}": (file(f"good.{suffix}", PICKLED), {})
        for suffix in "pyd pkl pickle pt pth bin ckpt npy npz py cls".split()
    },
    "pickle as json": (both(IMAGE, file("b.json", PICKLED)), {"b.png": "b.json is not valid JSON"}),
    "pickled text": (both(IMAGE, file("b.txt", PICKLED)), {"b.png": "caption is not UTF-8 text"}),
    "command as name": (file("pipe:touch sentinel;.png", png_bytes()), {"pipe": NO_CAPTION}),
    "sparse, pax 0.1": (sparse(map="0,0", size=str(2**30), numblocks="1"), {"b.png": NOT_REGULAR}),
    "sparse, pax 1.0": (
        sparse(major="1", minor="0", name="b.png", realsize=str(2**30)),
        {"x.tar": "not a tar file, or damaged"},
    ),
    "image without caption": (IMAGE, {"b.png": NO_CAPTION}),
    "caption without image": (file("b.txt"), {"b": "no image for this key"}),
    "empty caption": (both(IMAGE, file("b.txt", b" \n")), {"b.png": NO_CAPTION}),
    "caption longer than 1 MiB": (
        both(IMAGE, file("b.txt", b"x" * (2**20 + 1))),
        {"b.txt": "1048577 bytes, expected at most 1048576", "b.png": NO_CAPTION},
    ),
    "cut json": (both(IMAGE, file("b.json", b'{"caption"')), {"b.png": "b.json is not valid JSON"}),
    "list as json": (both(IMAGE, file("b.json", b"[1]")), {"b.png": "b.json is a JSON list"}),
    "json nested 500 deep": (
        both(IMAGE, file("b.json", b'{"a":' + b"[" * 500 + b"]" * 500 + b"}")),
        {"b.png": "b.json is nested deeper than 64"},
    ),
    "two images for a key": (
        both(file("good.jpg", png_bytes()), file("good.txt", b"first")),
        {"good.png": "a second member for the same key", "good.txt": "a second member"},
    ),
    "another format": (
        both(file("b.gif"), file("b.txt")),
        {"b": "b.gif is there, but its format is not one of"},
    ),
    "line end in the name": (file("b\n.png", png_bytes()), {"b\\n.png": NO_CAPTION}),
    "terminal code in the name": (file("\x1b[2Jb.png", png_bytes()), {"\\x1b[2Jb.png": NO_CAPTION}),
    "name from right to left": (file("\u202egnp.b.png", png_bytes()), {"\\u202egnp": NO_CAPTION}),
    "name that is not utf-8": (file("b\udcff.png", png_bytes()), {"b\\udcff": "not valid Unicode"}),
    "name of 5 000 letters": (file("z" * 5000 + ".png", png_bytes()), {"z" * 5000: NO_CAPTION}),
    "name of 20 000 letters": (
        file("z" * 20_000 + ".png", png_bytes()),
        {"x.tar": "a header of 20480 bytes, expected at most 16384"},
    ),
    "pax header of 100 kB": (
        file("b.png", pax_headers={"comment": "x" * 100_000}),
        {"x.tar": "expected at most 16384"},
    ),
    "pax header with a size below zero": (
        file("b.png", pax_headers={"size": "-1024"}),
        {"x.tar": "not a tar file, or damaged"},
    ),
    "unknown kind of member": (file("b.png", png_bytes(), type=b"Z"), {"b.png": ""}),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_a_hostile_member_is_skipped_or_passed_over(name: str, here: Path) -> None:
    build, said = MEMBERS[name]
    needs_gnu = "letters" in name or "\\udc" in repr(said)
    format = tarfile.GNU_FORMAT if needs_gnu else tarfile.PAX_FORMAT
    with tarfile.open("x.tar", "w", format=format) as archive:
        file("first.png", png_bytes(1))(archive)
        file("first.txt", b"first")(archive)
        build(archive)
        file("good.png", png_bytes())(archive)
        file("good.txt", b"fine")(archive)
    with nothing_comes_of_it(here):
        pairs = open_pairs("x.tar")
        found = {pair.path: pair.captions for pair in pairs}
        reasons = {record.path: record.reason for record in pairs.skipped}
        for index in range(len(pairs)):
            assert pairs.read_image(index) in (png_bytes(), png_bytes(1))
    assert found.pop("x.tar!first.png") == ("first",)
    if "x.tar" in said:  # damage: what lies behind it is lost, and that is said
        assert found == {}
    elif "good.png" in said:
        assert found == {"x.tar!good.jpg": ("first",)}
    else:
        assert found == {"x.tar!good.png": ("fine",)}
    assert len(reasons) == len(said)
    for key, reason in said.items():
        [shown] = [own for path, own in reasons.items() if key in path and reason in own]
        assert shown.isprintable()


def good_tar(**options: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        for key in ("a", "b"):
            add_member(archive, f"{key}.png", png_bytes())
            add_member(archive, f"{key}.txt", key.encode() * 600)
    return buffer.getvalue()


def flipped(position: int) -> bytes:
    data = bytearray(good_tar())
    data[position] ^= 1
    return bytes(data)


def claiming(name: str, kind: bytes = tarfile.REGTYPE) -> Callable[[], bytes]:
    """A good sample, and then a header that claims 1 TiB."""
    return lambda: good_tar()[: 512 * 5] + tar_header(name, 2**40, kind) + bytes(1024)


TOO_LARGE, TOO_LONG = "1099511627776 bytes, expected at most", "expected at most 16384"
NO_TAR = "not a tar file, or damaged"
# Blocks of a good tar: a.png 0-1, a.txt 2-4, b.png 5-6, b.txt 7-9, zeros from 10 on.
# Name -> the file, the keys that are read from it, and what is said of the rest.
FILES: dict[str, tuple[Callable[[], bytes], list[str], str]] = {
    "whole": (good_tar, ["a", "b"], ""),
    "whole, of 1979": (lambda: good_tar(format=tarfile.USTAR_FORMAT), ["a", "b"], ""),
    "without its end": (lambda: good_tar()[: 512 * 10], ["a", "b"], ""),
    "empty": (lambda: b"", [], NO_TAR),
    "text": (lambda: b"no tar at all", [], NO_TAR),
    "web page": (lambda: b"<html>" * 500, [], NO_TAR),
    "zeros alone": (lambda: bytes(10_240), [], "expected one of"),
    "gzip": (lambda: gzip.compress(good_tar()), [], NO_TAR),
    "gzip bomb": (lambda: gzip.compress(bytes(50_000_000)), [], NO_TAR),
    "bzip2": (lambda: bz2.compress(good_tar()), [], NO_TAR),
    "xz": (lambda: lzma.compress(good_tar()), [], NO_TAR),
    "zip": (lambda: b"PK\3\4" + bytes(600), [], NO_TAR),
    "cut in a header": (lambda: good_tar()[: 512 * 5 + 100], ["a"], "x.tar"),
    "cut in an image": (lambda: good_tar()[: 512 * 6 + 10], ["a"], "cut off by the end"),
    "cut in a caption": (lambda: good_tar()[: 512 * 8 + 10], ["a"], "cut off by the end"),
    "flipped bit in the first header": (lambda: flipped(20), [], NO_TAR),
    "flipped bit in a later header": (lambda: flipped(512 * 5 + 20), ["a"], "no valid header at"),
    "flipped bit in an image": (lambda: flipped(512 + 20), ["a", "b"], ""),
    "image that claims 1 TiB": (claiming("c.png"), ["a"], TOO_LARGE),
    "caption that claims 1 TiB": (claiming("c.txt"), ["a"], TOO_LARGE),
    "long name that claims 1 TiB": (claiming("x", tarfile.GNUTYPE_LONGNAME), ["a"], TOO_LONG),
    "pax header that claims 1 TiB": (claiming("x", tarfile.XHDTYPE), ["a"], TOO_LONG),
    "global header that claims 1 TiB": (claiming("x", tarfile.XGLTYPE), ["a"], TOO_LONG),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_tar_gives_what_lies_before_the_damage(name: str, tmp_path: Path) -> None:
    make, expected, said = FILES[name]
    (tmp_path / "x.tar").write_bytes(make())
    with nothing_comes_of_it(tmp_path):
        if not expected:
            with pytest.raises(UserError, match=f"no captioned images found.*{said}"):
                open_pairs(str(tmp_path / "x.tar"))
            return
        pairs = open_pairs(str(tmp_path))
        assert [pair.path for pair in pairs] == [f"x.tar!{key}.png" for key in expected]
        shown = "; ".join(f"{record.path}: {record.reason}" for record in pairs.skipped)
        assert said in shown
        assert bool(shown) == bool(said)


# What may be typed in place of a folder; none of it is run, fetched or waited for.
SOURCES = {
    "pipe:touch sentinel": "no folder or file",
    "pipe:touch sentinel # x.tar": "no folder or file",
    "|touch sentinel": "no folder or file",
    "$(touch sentinel)": "no folder or file",
    "`touch sentinel`.tar": "no folder or file",
    "a/b; touch sentinel": "no folder or file",
    "http://127.0.0.1:9/x.tar": "no folder or file",
    "https://127.0.0.1:9/x.parquet": "no folder or file",
    "s3://bucket/x.tar": "no folder or file",
    "hf://datasets/a/b": "no folder or file",
    "file:///etc": "no folder or file",
    "{000..999}.tar": "no folder or file",
    "*.tar": "no folder or file",
    "../../etc/none": "no folder or file",
    "a\0b": "no folder or file",
    "~nobody-of-this-name/x": "no folder or file",
    "\ud800": "no folder or file",
    "z" * 5000: "no folder or file",
    "/dev/zero": "is no folder, .tar or .parquet file",
    "/dev/null": "is no folder, .tar or .parquet file",
    "/etc/passwd": "is no folder, .tar or .parquet file",
    "": "source is '', expected a folder",
    " \n": "source is ' ",
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: repr(source)[:30])
def test_a_source_is_never_a_command(source: str, here: Path) -> None:
    with nothing_comes_of_it(here):
        with pytest.raises(UserError, match=SOURCES[source]):
            open_pairs(source)
