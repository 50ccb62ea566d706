"""Part of a run of the two-weight model, on whatever processes there are.

python line_runs.py FOLDER FIRST_STEP LAST_STEP [KIND:FROM-TO]: writes the samples and the weights
of each step to `seen-<first step>-<rank>.json`. The last argument spoils steps on rank 1 alone.
"""

import json
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import torch

if __name__ == "__main__":  # a dependency installs a package `tests` of its own
    sys.modules["tests"] = types.ModuleType("tests")
    sys.modules["tests"].__path__ = [str(Path(__file__).parents[1])]

from dalle_mini_impl.cli.main import run_script
from dalle_mini_impl.training.resume import find_checkpoint
from tests.reference.line_task import LineTask, build_trainer


def main(arguments: Sequence[str]) -> None:
    """Continues from the newest checkpoint, if there is one."""
    folder, first, last = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", "0"))
    spoiled: dict[int, str] = {}
    if len(arguments) > 3 and rank == 1:
        kind, steps = arguments[3].split(":")
        start, stop = map(int, steps.split("-"))
        spoiled = dict.fromkeys(range(start, stop), kind)
    task = LineTask(max_steps=last, spoiled=spoiled)
    trainer = build_trainer(
        task,
        folder,
        global_batch_size=8,
        decay_fraction=1e-9,  # no decay, whatever the last step is
        checkpoint_every_steps=2,
        resume_step=first,
    )
    weights: list[list[str]] = []
    step = trainer._step

    def recording_step(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        weights.append([float(value).hex() for value in trainer.model.parameters()])
        return step(batches)

    trainer._step = recording_step  # type: ignore[method-assign]
    checkpoint = find_checkpoint(folder, "latest") if first else None
    if checkpoint:
        trainer.restore(checkpoint)
    assert trainer.state.step == first
    trainer.train()
    seen = {"world": trainer.accelerator.num_processes, "ids": task.seen, "weights": weights}
    (folder / f"seen-{first}-{rank}.json").write_text(json.dumps(seen))
    trainer.tracker.close()


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
