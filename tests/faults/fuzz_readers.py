"""Coverage-guided fuzzing of the metadata and tar readers.

pip install -e '.[fuzz]'
python tests/faults/fuzz_readers.py metadata CORPUS -max_total_time=600
python tests/faults/fuzz_readers.py tar CORPUS -max_total_time=600

CORPUS is a folder that keeps what was found; a first run fills it with seeds. Any exception but
UserError, any file that appears, a hang of 20 s or 1 GiB of memory is a crash, whose input is
written to the current folder. ``test_data_fuzz.py`` runs the same checks with Hypothesis.
"""

import io
import json
import os
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

BLOCK = 512


def check_metadata(data: bytes, folder: Path) -> None:
    """Read the bytes as metadata.jsonl of a folder with a.png and sub/b.png."""
    from dalle_mini_impl.data.pairs import open_pairs
    from dalle_mini_impl.errors import UserError

    (folder / "metadata.jsonl").write_bytes(data)
    try:
        pairs = open_pairs(str(folder))
    except UserError:
        return
    root = str(folder.resolve())
    for pair in pairs:
        _check_pair(pair)
        assert os.path.realpath(pair.file).startswith(f"{root}{os.sep}")
    assert all(record.reason.isprintable() for record in pairs.skipped)
    _check_folder(folder)


def check_tar(data: bytes, folder: Path) -> None:
    """Read the bytes as a tar."""
    from dalle_mini_impl.data.readers.captions import ReadOptions
    from dalle_mini_impl.data.readers.webdataset import read_tar

    repair, data = data[:1] and data[0] % 2, data[1:]
    data = repaired(data) if repair else data
    (folder / "x.tar").write_bytes(data)
    pairs = read_tar(folder / "x.tar", ReadOptions()).require_captions()
    for pair in pairs:
        _check_pair(pair)
        assert ".." not in pair.path.split("/")
        assert 0 < pair.offset <= pair.offset + pair.size <= len(data)
    assert all(record.reason.isprintable() for record in pairs.skipped)
    _check_folder(folder)


def _check_pair(pair: Any) -> None:
    assert pair.captions
    assert all(text.strip() and text.encode() for text in pair.captions)
    json.loads(json.dumps(pair.attributes, default=str))


def _check_folder(folder: Path) -> None:
    assert {name.name for name in os.scandir(folder)} <= {"metadata.jsonl", "x.tar", "a.png", "sub"}


def repaired(data: bytes) -> bytes:
    """Give every block that is read as a header its right checksum."""
    blocks, position = bytearray(data), 0
    while position + BLOCK <= len(blocks):
        header = blocks[position : position + BLOCK]
        if any(header):
            header[148:156] = b" " * 8
            blocks[position + 148 : position + 156] = b"%06o\0 " % sum(header)
        try:
            size = max(0, tarfile.nti(bytes(header[124:136])))  # type: ignore[attr-defined]
        except tarfile.HeaderError:
            size = 0
        position += BLOCK * (1 + -(-size // BLOCK))
    return bytes(blocks)


def prepare(folder: Path) -> Path:
    """Make the folder that both checks work in."""
    (folder / "a.png").touch()
    (folder / "sub").mkdir()
    (folder / "sub" / "b.png").touch()
    return folder


def seeds(kind: str) -> list[bytes]:
    """Good inputs to begin with."""
    if kind == "metadata":
        rows: list[dict[str, Any]] = [
            {"file_name": "a.png", "text": "x", "split": "val", "n": [1, {"m": None}]},
            {"file_name": "sub/b.png", "texts": ["x", "하트"]},
            {"file_name": "../a.png", "text": "\ud800"},
        ]
        lines = [json.dumps(row).encode() for row in rows]
        return [*lines, b"\n".join(lines[:2]), b"\xef\xbb\xbf" + lines[0] + b"\r\n"]
    found = []
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
            long = "z" * 200
            for name in ("a.png", "a.txt", "a.json", f"{long}.png", f"{long}.txt"):
                if format != tarfile.USTAR_FORMAT or len(name) < 100:
                    member = tarfile.TarInfo(name)
                    body = b'{"text": "x"}' if name.endswith("json") else b"x"
                    member.size = len(body)
                    if format == tarfile.PAX_FORMAT:
                        member.pax_headers = {"GNU.sparse.map": "0,1", "comment": "x"}
                    archive.addfile(member, io.BytesIO(body))
        found += [b"\0" + buffer.getvalue()[: 512 * 20], b"\1" + buffer.getvalue()[: 512 * 20]]
    return found


CHECKS: dict[str, Callable[[bytes, Path], None]] = {"metadata": check_metadata, "tar": check_tar}


def main(kind: str, corpus: str, *options: str) -> None:
    """Fuzz one reader until a crash or the time given."""
    import atheris

    with atheris.instrument_imports(include=["json", "tarfile", "dalle_mini_impl"]):
        import dalle_mini_impl.data.pairs  # noqa: F401
        import dalle_mini_impl.data.readers.webdataset  # noqa: F401
    for module in (json.decoder, json.scanner, tarfile.TarInfo, tarfile.TarFile):
        for name, function in vars(module).items():
            if callable(function) and hasattr(function, "__code__"):
                setattr(module, name, atheris.instrument_func(function))
    Path(corpus).mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds(kind)):
        (Path(corpus) / f"seed-{number}").write_bytes(seed)
    folder = prepare(Path(tempfile.mkdtemp()))
    limits = "-rss_limit_mb=1024 -timeout=20 -max_len=16384 -len_control=20 -print_final_stats=1"
    arguments = [sys.argv[0], *limits.split(), *options, corpus]
    atheris.Setup(arguments, lambda data: CHECKS[kind](data, folder))
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
