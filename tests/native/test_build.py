"""Compiling: once, by several processes at once, never into or from a folder that is not safe."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dalle_mini_impl.native import build
from dalle_mini_impl.pipeline import TextToImagePipeline

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    build.load_library.cache_clear()
    yield tmp_path / "dalle_mini_impl"
    build.load_library.cache_clear()


def test_the_folder_is_closed_to_others(cache: Path) -> None:
    assert build.cache_folder() == cache
    assert cache.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_may_write_to_is_refused(cache: Path, mode: int) -> None:
    cache.mkdir()
    cache.chmod(mode)
    with pytest.raises(build.UnavailableError, match="others may write"):
        build.load_library()
    assert list(cache.iterdir()) == []


def test_a_link_in_place_of_the_folder_is_refused(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    cache.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(build.UnavailableError, match="a link"):
        build.cache_folder()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_someone_else_is_refused(cache: Path) -> None:
    cache.mkdir(mode=0o700)
    os.chown(cache, 12345, 12345)
    with pytest.raises(build.UnavailableError, match="not yours"):
        build.cache_folder()


def test_without_compiler_torch_generates_and_warns(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pipeline = TextToImagePipeline.from_pretrained(REPOSITORY / "checkpoints" / "emoji-64")
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert not pipeline.use_native("float32")
    assert [record.message for record in caplog.records] == [
        "generating with plain torch: no C++ compiler (c++, g++, clang++) is on the PATH"
    ]
    assert pipeline("a cat").images[0].size == (64, 64)


def test_a_compiler_that_fails_is_named_and_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "bin" / "c++"
    compiler.parent.mkdir()
    compiler.write_text(
        "#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'no space' >&2; exit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{compiler.parent}:/usr/bin:/bin")
    with pytest.raises(build.UnavailableError, match="no space"):
        build.load_library()
    assert list(cache.iterdir()) == []


@pytest.mark.slow  # compiles three times
@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_two_processes_compile_at_once_and_damage_is_compiled_anew(cache: Path) -> None:
    command = [sys.executable, "-c", "import dalle_mini_impl.native.build as b; b.load_library()"]
    both = [subprocess.Popen(command, cwd=REPOSITORY) for _ in range(2)]
    assert [process.wait(timeout=500) for process in both] == [0, 0]
    (library,) = cache.glob("*.so")
    assert sorted(path.suffix for path in cache.iterdir()) == [".sha256", ".so"]
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])
    assert build.load_library().decode is not None
    assert library.read_bytes() == whole
    before = library.stat().st_mtime_ns
    build.load_library.cache_clear()
    build.load_library()
    assert library.stat().st_mtime_ns == before
    library.chmod(0o722)
    build.load_library.cache_clear()
    with pytest.raises(build.UnavailableError, match="others may write"):
        build.load_library()
