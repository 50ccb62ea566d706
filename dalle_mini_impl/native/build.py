"""Compiling ``decoder.cpp`` with the system's own compiler, once per machine, for this user alone.

A library is code: it is loaded only from a folder that no one else can write to, and only if its
checksum matches. Several processes may compile at once: each renames a finished file.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from dalle_mini_impl.errors import one_line

SOURCE = Path(__file__).with_name("decoder.cpp")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared", "-ffp-contract=fast", "-w")
# The first that compiles: not every compiler knows each of them.
MACHINE_FLAGS = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())
MAX_SECONDS = 600  # a compilation takes five on an idle machine


class UnavailableError(Exception):
    """Why this machine or this model has no compiled pass."""


@functools.cache
def load_library() -> ctypes.CDLL:
    """Load the compiled pass, compiled before if need be.

    Raises:
        UnavailableError: If there is no compiler, it fails, or the cache folder is not safe.
    """
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise UnavailableError(f"no C++ compiler ({', '.join(COMPILERS)}) is on the PATH")
    try:
        library = cache_folder() / f"decoder-{_fingerprint(compiler)}.so"
        if not _is_intact(library):
            _compile(compiler, library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        # A compiler's output fills pages; a message is one line.
        reason = one_line(error)[:300]
        raise UnavailableError(f"{compiler} made no library that loads: {reason}") from error


def cache_folder() -> Path:
    """Return the folder of compiled files, created if missing; only this user may write to it."""
    # Without owners of files, nobody can tell who wrote the library.
    if not hasattr(os, "getuid"):
        raise UnavailableError(f"not supported on {sys.platform}")
    if sys.platform == "darwin":
        parent = Path.home() / "Library" / "Caches"
    else:
        parent = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = parent / "dalle_mini_impl"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_own(folder)
    return folder


def _require_own(path: Path) -> None:
    """Refuse paths that someone else owns or may write to, and links, which may point anywhere."""
    # Not stat, which would judge a link by the file it points to.
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise UnavailableError(f"{path}: a link, not yours, or others may write to it")


def _fingerprint(compiler: str) -> str:
    """Hash everything that decides the compiled file: source, flags, compiler and processor."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, check=True, timeout=MAX_SECONDS
    ).stdout
    processor = f"{platform.machine()} {platform.processor()}"
    # Home folders are shared by machines: -march=native code of one may be illegal on another.
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = ("model name", "flags", "Features", "CPU part")
        lines = cpuinfo.read_text(errors="replace").splitlines()
        processor += "\n".join(sorted({line for line in lines if line.startswith(names)}))
    digest = hashlib.sha256(SOURCE.read_bytes())
    for part in (repr((FLAGS, MACHINE_FLAGS)), compiler, processor):
        digest.update(b"\0" + part.encode())
    digest.update(version)
    return digest.hexdigest()[:32]


def _is_intact(library: Path) -> bool:
    """Check the library's sha256: a truncated one would crash on loading."""
    checksum = _checksum_file(library)
    if not (library.is_file() and checksum.is_file()):
        return False
    _require_own(library)
    _require_own(checksum)
    return hashlib.sha256(library.read_bytes()).hexdigest() == checksum.read_text(errors="replace")


def _checksum_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _compile(compiler: str, library: Path) -> None:
    """Compile under a name of this process's own, then rename."""
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="building-") as folder:
        made = Path(folder) / library.name
        for machine_flags in MACHINE_FLAGS:
            command = [compiler, *FLAGS, *machine_flags, str(SOURCE), "-o", str(made)]
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=MAX_SECONDS
            )
            if done.returncode == 0:
                break
        else:
            raise UnavailableError(f"{compiler} failed: {done.stderr.strip()[:300]}")
        made.chmod(0o700)
        checksum = _checksum_file(made)
        checksum.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
        checksum.chmod(0o600)
        # Library first: a process that finds a new library with an old checksum compiles again.
        # The same source, flags and compiler make the same bytes: two processes do not disagree.
        made.replace(library)
        checksum.replace(_checksum_file(library))
