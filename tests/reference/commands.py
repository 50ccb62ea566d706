"""Commands as a user runs them: in this process, or in one of their own."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from dalle_mini_impl.cli.main import run_command
from dalle_mini_impl.training.run import save_config
from tests.reference import tiny

REPOSITORY = Path(__file__).parents[2]


def run_here(name: str, *arguments: str | Path) -> int:
    """Runs a command in this process; returns its exit code. Global settings stay as they were."""
    precision = torch.get_float32_matmul_precision()
    try:
        run_command(name, [str(argument) for argument in arguments])
    except SystemExit as exit_:
        return int(exit_.code or 0)
    finally:
        torch.set_float32_matmul_precision(precision)
    return 0


def run_python(
    *arguments: str | Path, processes: int = 1, timeout: float = 300, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run Python in the repository's folder, on several processes by torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **env},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_apart(
    name: str, *arguments: str | Path, processes: int = 1, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a script as a user does."""
    return run_python(f"scripts/{name}.py", *arguments, processes=processes, **env)


def write_presets(data: Path, out: Path) -> tuple[Path, Path]:
    """Two tiny presets as YAML files."""
    vqvae = tiny.vqvae_run(data, out / "vqvae", max_steps=3)
    dalle = tiny.dalle_run(data, out / "vqvae" / "model", out / "dalle", max_steps=3)
    out.mkdir(exist_ok=True)
    for name, config in (("vqvae", vqvae), ("dalle", dalle)):
        save_config(config, out / f"{name}.yaml")
    return out / "vqvae.yaml", out / "dalle.yaml"
