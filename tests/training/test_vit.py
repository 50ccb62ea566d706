"""The classifier's loss, scores and baseline, and a classifier that learns colors."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dalle_mini_impl.builtin_datasets.labelled_images import LabelledImages, LabelledSplits
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.training.vit import (
    ViTRunConfig,
    ViTTask,
    ViTTaskConfig,
    nearest_neighbor_scores,
    score_classes,
)
from tests.reference import tiny


def images(levels: list[int], labels: list[int], families: str) -> LabelledImages:
    pixels = torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4)
    return LabelledImages(pixels.contiguous(), torch.tensor(labels), tuple(families))


SPLITS = LabelledSplits(
    images([0, 10, 20, 200, 210, 220], [0, 0, 0, 1, 1, 1], "aabbcd"),
    images([12, 15, 190, 205], [0, 1, 1, 1], "eeef"),
    ("dark", "light"),
)


def test_a_family_counts_once() -> None:
    scores = score_classes(torch.tensor([0, 0, 1, 0]), SPLITS.held_out)
    assert scores == pytest.approx({"accuracy": 0.5, "family_accuracy": (2 / 3 + 0) / 2})


def test_nearest_neighbors() -> None:
    assert nearest_neighbor_scores(SPLITS)["accuracy"] == 0.75  # one label is wrong on purpose


class Brightness(nn.Module):
    """Knows the classes: the mean of the pixels, in [-1, 1], is the logit."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, pixels: Tensor) -> Tensor:
        mean = self.scale * pixels.mean(dim=(1, 2, 3))
        return torch.stack([-mean, mean], dim=1)


def build_task(splits: LabelledSplits, **changes: float) -> ViTTask:
    config = ViTRunConfig(output_dir="", task=ViTTaskConfig(**changes))  # type: ignore[arg-type]
    return ViTTask(splits, config, Brightness(), baseline={})


def test_loss_and_evaluation() -> None:
    task = build_task(SPLITS, label_smoothing=0.2)
    batch = task.make_batch(torch.tensor([0, 5]), torch.full((2, 2), 0.5))
    assert batch["pixels"].amin() == -1.0
    assert batch["pixels"].amax() == pytest.approx(220 / 127.5 - 1)
    loss, metrics = task.loss(task.model, batch)
    log_probs = Brightness()(batch["pixels"]).log_softmax(dim=-1)
    right, wrong = log_probs[[0, 1], [0, 1]].mean(), log_probs[[0, 1], [1, 0]].mean()
    torch.testing.assert_close(loss, -(0.9 * right + 0.1 * wrong))
    assert float(metrics["accuracy"]) == 1.0
    assert task.evaluate()["validation/accuracy"] == 0.75
    weights = task.sample_weights
    assert weights is not None
    assert weights.tolist() == pytest.approx([0.5**0.5] * 4 + [1.0] * 2)


def test_shift_follows_its_uniforms() -> None:
    ramp = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4)
    one = LabelledImages(ramp, torch.tensor([0]), ("a",))
    task = build_task(LabelledSplits(one, one, ("x",)), max_shift=1)

    def moved(down: float, right: float) -> Tensor:
        batch = task.make_batch(torch.tensor([0]), torch.tensor([[down, right]]))
        return ((batch["pixels"][0, 0] + 1) * 127.5).round()

    assert torch.equal(moved(0.5, 0.5), ramp[0, 0].float())
    assert torch.equal(moved(0.99, 0.5)[1:], ramp[0, 0, :-1].float())
    assert torch.equal(moved(0.5, 0.0)[:, :-1], ramp[0, 0, :, 1:].float())


def test_it_learns_colors(tmp_path: Path) -> None:
    data = tiny.write_data(tmp_path / "data", count=60)
    options = {"max_steps": 80, "every": 40, "global_batch_size": 24, "learning_rate": 1e-2}
    folder, _ = tiny.train(tiny.vit_run(data, tmp_path / "run", **options))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["model"]["accuracy"] > 0.9
    assert report.keys() == {"model", "nearest neighbors"}
    assert json.loads((folder / "config.json").read_text())["class_names"] == sorted(tiny.COLORS)
    assert (folder / "model.safetensors").is_file()


def test_patches_that_do_not_fit_are_refused(data: Path, tmp_path: Path) -> None:
    config = tiny.vit_run(data, tmp_path / "run")
    model = dataclasses.replace(config.model, patch_size=5)
    with pytest.raises(UserError, match=r"model.patch_size: got 5, expected a divisor"):
        tiny.train(dataclasses.replace(config, model=model))
