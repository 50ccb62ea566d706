"""One process of the two-process tests, under torchrun: trains, generates, and reports.

Argument: a folder with `vqvae.yaml` and `dalle.yaml`, and `model/` beside it; results go there.
"""

import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import torch

if __name__ == "__main__":  # a dependency installs a package `tests` of its own
    sys.modules["tests"] = types.ModuleType("tests")
    sys.modules["tests"].__path__ = [str(Path(__file__).parents[1])]

from dalle_mini_impl.cli.generate import generate_to_folder
from dalle_mini_impl.cli.main import run_script
from dalle_mini_impl.config import read_config
from dalle_mini_impl.training.dalle import DalleRunConfig
from dalle_mini_impl.training.vqvae import VQVAERunConfig
from tests.reference import tiny
from tests.reference.line_task import LineTask, build_trainer

PROMPTS = ["a red disc", "파란 상자", "a green box"]


def fit_a_line(folder: Path) -> LineTask:
    """Trains the two-weight model on whatever processes there are."""
    task = LineTask(max_steps=5)
    build_trainer(task, folder, gradient_accumulation_steps=2, global_batch_size=8).train()
    return task


def generate(model: Path, out: Path) -> None:
    """Generates three prompts."""
    generate_to_folder(
        str(model),
        prompts=PROMPTS,
        num_images=2,
        num_candidates=2,
        seed=3,
        out=out,
        overrides={"guidance_scale": 1.5},
    )


def main(arguments: Sequence[str]) -> None:
    """Does all of it and writes `seen-<rank>.json`."""
    folder = Path(arguments[0])
    torch.set_num_threads(1)
    task = fit_a_line(folder / "line")
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    sys.stdout.write(f"process {rank} of {world_size}\n")  # one write: lines must not mix
    sys.stdout.flush()
    (folder / f"seen-{rank}.json").write_text(json.dumps({"world": world_size, "ids": task.seen}))
    tiny.train(read_config(VQVAERunConfig, folder / "vqvae.yaml"))
    tiny.train(read_config(DalleRunConfig, folder / "dalle.yaml"))
    generate(folder.parent / "model", folder / "images")


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
