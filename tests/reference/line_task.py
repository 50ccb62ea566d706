"""A model of two weights and its task, for tests of the trainer."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle_mini_impl.hardware import build_accelerator
from dalle_mini_impl.training.task import ImageGrid
from dalle_mini_impl.training.tracking import TrackingConfig, open_tracker
from dalle_mini_impl.training.trainer import Trainer
from tests.reference.tiny import render_image, training_config

Spoiled = dict[int, str] | None  # step -> what is wrong with it


class LineTask:
    """Fits a line; the loss can be spoiled at chosen steps."""

    num_samples = 16
    num_uniforms = 1
    tokens_per_sample = 7
    identity = "line"
    sample_weights = None

    def __init__(
        self,
        *,
        spoiled: Spoiled = None,
        max_steps: int = 20,
        seconds_per_step: float = 0.0,
        scores: Sequence[float] = (),
    ) -> None:
        self.scores = list(scores)
        self.selection_metric: str | None = "validation/score" if scores else None
        self.spoiled, self.max_steps = spoiled or {}, max_steps
        self.seconds_per_step = seconds_per_step
        torch.manual_seed(0)
        self.model: nn.Module = nn.Linear(1, 1)
        self.x = torch.linspace(-1, 1, self.num_samples)
        self.seen: list[list[int]] = []
        self.progress: list[float] = []
        self.modes: list[tuple[str, bool]] = []
        self.evaluated_bias: list[float] = []

    def make_batch(self, sample_ids: Tensor, uniforms: Tensor) -> dict[str, Tensor]:
        assert uniforms.shape == (len(sample_ids), 1)
        return {"ids": sample_ids, "x": self.x[sample_ids]}

    def loss(
        self, model: nn.Module, batch: dict[str, Tensor], *, progress: float, **_: object
    ) -> tuple[Tensor, dict[str, Tensor]]:
        step = len(self.progress)
        self.seen.append(batch["ids"].tolist())
        self.progress.append(progress)
        self.modes.append(("train", model.training))
        time.sleep(self.seconds_per_step)
        x = batch["x"][:, None]
        loss = (model(x) - (3 * x + 1)).square().mean()
        kind = self.spoiled.get(step)
        if kind == "loss":
            loss = loss * torch.tensor(float("nan"))
        elif kind == "gradient":  # the loss is finite, its gradient is not
            loss = loss + (next(model.parameters()) * 0).clamp_min(0).sqrt().sum()
        elif kind == "infinite":
            loss = loss + torch.tensor(float("inf"))
        return loss, {"twice": 2 * loss.detach()}

    def evaluate(self) -> dict[str, float]:
        self.modes.append(("evaluate", self.model.training))
        bias = float(self.model.get_parameter("bias"))
        self.evaluated_bias.append(bias)
        if self.scores:
            return {"validation/bias": bias, "validation/score": self.scores.pop(0)}
        return {"validation/bias": bias}

    def make_image_grids(self) -> list[ImageGrid]:
        self.modes.append(("generate", self.model.training))
        return [ImageGrid("line", [render_image(0)], ["a line"])]

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()


def build_trainer(task: LineTask, out: Path, *, resume_step: int = 0, **changes: Any) -> Trainer:
    """A run of `task` at step 0, without W&B."""
    options = {"max_steps": task.max_steps, "every": 1000, "warmup_steps": 1}
    options |= {"global_batch_size": 4, "learning_rate": 0.05}
    accelerator = build_accelerator("no")
    tracker = open_tracker(
        TrackingConfig(mode="disabled"),
        output_dir=out,
        run_config={},
        is_main=accelerator.is_main_process,
        resume_step=resume_step,
    )
    config = training_config(**(options | changes))
    return Trainer(task, config, accelerator=accelerator, tracker=tracker, output_dir=out)
