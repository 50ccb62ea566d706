"""The wheel in an environment and a folder of its own."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.reference import tiny
from tests.reference.commands import REPOSITORY


def run(*command: str | Path, cwd: Path, code: int = 0) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(part) for part in command],
        env={**env, "OMP_NUM_THREADS": "1"},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_wheel(model_dir: Path, tmp_path: Path) -> None:
    """Built from a copy, so that no build folder stays in the repository."""
    source, empty = tmp_path / "source", tmp_path / "empty"
    empty.mkdir()
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("dalle_mini_impl", "vqvae", "configs"):
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    run(*build, "-w", tmp_path, source, cwd=empty)
    [wheel] = tmp_path.glob("*.whl")

    venv.create(tmp_path / "venv", symlinks=True, with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=empty)[:-1])
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps"]
    run(*install, "--no-index", wheel, cwd=empty)
    # Libraries come from this environment, the package from the wheel: its folder is the first.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = run(python, "-c", "import dalle_mini_impl; print(dalle_mini_impl.__file__)", cwd=empty)
    assert where.startswith(str(site))

    command = tmp_path / "venv" / "bin" / "dalle-mini"
    assert "  generate " in run(command, "--help", cwd=empty)
    options = ["--model", model_dir, "--prompt", "a red disc", "--num-images", "2"]
    assert "grid: out/images/grid-0000.png" in run(command, "generate", *options, cwd=empty)
    assert len(list((empty / "out" / "images").glob("0000-a-red-disc_*.png"))) == 2
    data = tiny.write_data(tmp_path / "data")
    preset = "configs/demo/vqvae.yaml"
    check = [command, "check_data", "--source", data, "--config", preset]
    shown = run(*check, cwd=empty, code=1)  # images are tiny, which is a problem
    assert "weights, gradients and optimizer: " in shown
    packaged = site / "dalle_mini_impl" / "configs"
    assert sorted(path.relative_to(packaged) for path in packaged.glob("*/*.yaml")) == sorted(
        path.relative_to(REPOSITORY / "configs") for path in REPOSITORY.glob("configs/*/*.yaml")
    )
    modules = {
        path.relative_to(REPOSITORY).as_posix()
        for package in ("dalle_mini_impl", "vqvae")
        for path in (REPOSITORY / package).rglob("*.py")
    }
    installed = {path.relative_to(site).as_posix() for path in site.rglob("*.py")}
    assert modules <= installed
