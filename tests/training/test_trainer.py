"""The trainer: non-finite numbers never reach the weights, budgets end, numbers are logged."""

import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dalle_mini_impl.data.sample_order import SampleOrder
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.hardware import LEFTOVERS, build_accelerator
from dalle_mini_impl.training.checkpoint import load_checkpoint
from dalle_mini_impl.training.resume import refuse_used_folder
from dalle_mini_impl.training.task import Task
from dalle_mini_impl.training.trainer import Trainer
from tests.reference.line_task import LineTask, build_trainer
from tests.reference.log_lines import log_lines
from tests.reference.tiny import read_metrics


def snapshot(trainer: Trainer) -> dict[str, Tensor]:
    """Weights, averaged weights and optimizer state."""
    found = {f"model.{name}": value.clone() for name, value in trainer.model.state_dict().items()}
    assert trainer.average is not None
    found |= {f"average.{name}": value.clone() for name, value in trainer.average.weights.items()}
    for number, optimizer in enumerate(trainer.optimizers):
        for index, state in enumerate(optimizer.state.values()):
            found |= {f"{number}.{index}.{name}": value.clone() for name, value in state.items()}
    return found


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("kind", ["loss", "gradient", "infinite"])
def test_non_finite_numbers_never_reach_the_weights(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = build_trainer(LineTask(spoiled={3: kind, 4: kind}), tmp_path, ema_decay=0.5)
    snapshots = []
    for step in range(6):
        trainer._step(trainer._batches(step))
        trainer.state.step += 1
        snapshots.append(snapshot(trainer))
    assert any(name.endswith("exp_avg") for name in snapshots[0])
    for value in snapshots[-1].values():
        assert value.isfinite().all()
    assert_equal(snapshots[2], snapshots[3])
    assert_equal(snapshots[2], snapshots[4])
    for name in ("model.weight", "average.weight"):
        assert not torch.equal(snapshots[4][name], snapshots[5][name])
    assert (trainer.state.skipped_in_all, trainer.state.skipped_in_a_row) == (2, 0)
    assert "step 3: loss or gradient not finite; no update" in caplog.text
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_ten_non_finite_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    task = LineTask(spoiled=dict.fromkeys(range(2, 20), "loss"))
    trainer = build_trainer(task, tmp_path)
    with pytest.raises(UserError, match=r"not finite 10 steps in a row up to step 11") as caught:
        trainer.train()
    for part in ("not_finite.jsonl lists the samples", "training.learning_rate"):
        assert part in str(caught.value)
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
    rows = [json.loads(row) for row in (tmp_path / "not_finite.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(2, 12))
    assert rows[0]["loss_of_each_process"] == ["nan"]

    task = LineTask(spoiled={step: "loss" for step in range(20) if step % 10 != 9})
    build_trainer(task, tmp_path / "nine").train()  # never ten in a row


def folders_of(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").glob("*"))


def test_a_skipped_step_is_not_saved(tmp_path: Path) -> None:
    # Steps 3 to 6 are skipped: the checkpoint of step 4 waits until one is finite again.
    task = LineTask(spoiled=dict.fromkeys(range(3, 7), "loss"), max_steps=10)
    build_trainer(task, tmp_path, checkpoint_every_steps=4).train()
    assert folders_of(tmp_path) == ["step-00000008", "step-00000010"]

    trainer = build_trainer(LineTask(), tmp_path)
    trainer.restore(load_checkpoint(tmp_path / "checkpoints" / "step-00000008"))
    assert (trainer.state.skipped_in_all, trainer.state.skipped_in_a_row) == (4, 0)


def test_a_failed_run_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    task = LineTask(spoiled=dict.fromkeys(range(4, 20), "loss"))
    trainer = build_trainer(task, tmp_path, checkpoint_every_steps=1)
    # That of step 4 holds the weights whose loss is not finite.
    good = re.escape(str(tmp_path / "checkpoints" / "step-00000003"))
    with pytest.raises(UserError, match=f"up to step 13; .*pass --resume {good}$"):
        trainer.train()
    assert folders_of(tmp_path) == ["step-00000003", "step-00000004"]

    task = LineTask(spoiled=dict.fromkeys(range(20), "loss"))
    with pytest.raises(UserError, match=r"\(now 0.05\) and start again in another output_dir$"):
        build_trainer(task, tmp_path / "none", checkpoint_every_steps=1).train()
    assert folders_of(tmp_path / "none") == []


def test_non_finite_weights_are_not_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = build_trainer(LineTask(), tmp_path)
    with torch.no_grad():
        trainer.model.weight.fill_(float("inf"))
    assert not trainer.save()
    assert folders_of(tmp_path) == []
    assert "weights not finite; no checkpoint" in caplog.text


def test_recovery_from_a_far_too_high_learning_rate(tmp_path: Path) -> None:
    build_trainer(LineTask(max_steps=6), tmp_path, checkpoint_every_steps=2).train()
    options = {"checkpoint_every_steps": 1, "learning_rate": 1e30}
    wild = build_trainer(LineTask(max_steps=40), tmp_path, **options)
    wild.restore(load_checkpoint(tmp_path / "checkpoints" / "step-00000006"))
    with pytest.raises(UserError, match="not finite 10 steps in a row") as caught:
        wild.train()
    good = Path(str(caught.value).rsplit("--resume ", 1)[1])
    sane = build_trainer(LineTask(max_steps=20), tmp_path)
    sane.restore(load_checkpoint(good))
    sane.train()
    assert sane.state.step == 20
    assert all(value.abs().max() < 10 for value in sane.model.state_dict().values())


def test_a_budget_in_minutes(tmp_path: Path) -> None:
    task = LineTask(seconds_per_step=0.02)
    limits = {"max_steps": 100_000, "max_minutes": 1.5 / 60}
    trainer = build_trainer(task, tmp_path, decay_fraction=0.5, **limits)
    started = time.perf_counter()
    with log_lines() as lines:
        trainer.train()
    expected = rf"{trainer.state.step} steps in 0\.0 minutes \(\d+\.\d per second\)"
    assert re.fullmatch(expected, lines[-1])
    assert time.perf_counter() - started < 60
    assert 2 <= len(task.progress) <= 76
    assert task.progress == sorted(task.progress)
    assert task.progress[0] == 0.0
    assert 0 < task.progress[-1] < 1.0
    assert trainer.state.progress(trainer.config) == 1.0
    # The last update is made with what is left of the rate one step before the end.
    last = read_metrics(tmp_path)[-2]
    assert last["progress"] == 1.0
    expected = 0.05 * (1 - task.progress[-1]) / 0.5
    assert last["train/learning_rate"] == pytest.approx(min(0.05, expected), rel=1e-4)
    rates = [row["train/learning_rate"] for row in read_metrics(tmp_path) if "progress" in row]
    assert max(rates) == pytest.approx(0.05)
    assert rates[-1] < 0.05
    later = rates[rates.index(max(rates)) :]
    assert later == sorted(later, reverse=True)


def test_a_budget_in_steps(tmp_path: Path) -> None:
    task = LineTask(max_steps=40)
    trainer = build_trainer(task, tmp_path, decay_fraction=0.5)
    with log_lines() as lines:
        trainer.train()
    assert trainer.state.step == 40
    rates = [row["train/learning_rate"] for row in read_metrics(tmp_path) if "progress" in row]
    assert rates[-1] == pytest.approx(0.05 * (1 / 40) / 0.5)
    assert lines[-2].startswith("100 %  step 40  loss ")
    assert "tokens/s" in lines[-2]
    assert lines[-2].endswith(", 00:00 left")


def test_cost_of_checkpoints_is_logged(tmp_path: Path) -> None:
    task = LineTask(max_steps=6)
    trainer = build_trainer(task, tmp_path, log_every_steps=2, checkpoint_every_steps=2)
    save = trainer.save

    def slow_save() -> bool:
        time.sleep(0.2)
        return save()

    trainer.save = slow_save  # type: ignore[method-assign]
    started = time.perf_counter()
    with log_lines() as lines:
        trainer.train()
    all_seconds = time.perf_counter() - started
    found = re.fullmatch(r"checkpoints: 3 in (\S+) s, (\S+) % of the time", lines[-1])
    assert found is not None
    seconds, percent = map(float, found.groups())
    assert 0.6 <= seconds < all_seconds
    assert 100 * seconds / all_seconds - 1 < percent < 100  # seconds are given to hundredths
    rows = read_metrics(tmp_path)
    fractions = [row["train/save_fraction"] for row in rows if "progress" in row]
    assert fractions[0] == 0
    assert all(0 < fraction < 1 for fraction in fractions[1:])


def test_metrics_are_means_and_speeds(tmp_path: Path) -> None:
    task = LineTask(max_steps=6, seconds_per_step=0.02)
    intervals = {"log_every_steps": 3, "evaluate_every_steps": 2, "sample_every_steps": 4}
    build_trainer(task, tmp_path, **intervals).train()
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [2, 3, 4, 6, 6]
    logged = [row for row in rows if "progress" in row]
    assert [row["progress"] for row in logged] == [0.5, 1.0]
    for row in logged:
        assert row["train/twice"] == pytest.approx(2 * row["train/loss"])
        assert row["train/tokens_per_second"] == pytest.approx(7 * row["train/samples_per_second"])
        assert 4 < row["train/samples_per_second"] < 4 / 0.02
        assert 0 <= row["train/data_wait_fraction"] <= 1
        assert row["train/save_fraction"] == 0  # the one checkpoint comes after the last line
        assert row["train/gradient_norm"] > 0
    evaluated = [step for step, row in enumerate(rows) if "validation/bias" in row]
    assert len(evaluated) == 3
    images = sorted(path.name for path in (tmp_path / "samples").glob("*.png"))
    assert images == ["line_00000004.png", "line_00000006.png"]
    assert {mode for name, mode in task.modes if name == "train"} == {True}
    assert {mode for name, mode in task.modes if name != "train"} == {False}


def test_averaged_weights_are_evaluated_and_kept(tmp_path: Path) -> None:
    task = LineTask(max_steps=4)
    trainer = build_trainer(task, tmp_path, every=2, ema_decay=0.9)
    trainer.train()
    assert trainer.average is not None
    average, trained = float(trainer.average.weights["bias"]), trainer.model.bias.item()
    assert average != trained
    assert task.evaluated_bias[-1] == average
    trainer.use_kept()
    assert trainer.model.bias.item() == average


SCORES = (-3.0, -1.0, -2.0, -1.5, -1.0, -4.0)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@pytest.mark.parametrize("resume_at", [None, 4, 6])
def test_the_best_weights_are_kept(
    ema_decay: float,
    resume_at: int | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Those of the second of six evaluations, also after a resume; an equal one comes later."""
    options: dict[str, Any] = {"every": 2, "ema_decay": ema_decay, "checkpoint_every_steps": 2}
    task = LineTask(max_steps=12, scores=SCORES)
    trainer = build_trainer(task, tmp_path, **options)
    with caplog.at_level(logging.INFO):
        if resume_at is None:
            trainer.train()
        else:
            stopped = LineTask(max_steps=resume_at, scores=SCORES)
            build_trainer(stopped, tmp_path, **options).train()
            task = LineTask(max_steps=12, scores=SCORES[resume_at // 2 :])
            trainer = build_trainer(task, tmp_path, resume_step=resume_at, **options)
            trainer.restore(load_checkpoint(tmp_path / f"checkpoints/step-{resume_at:08d}"))
            trainer.train()
            task.evaluated_bias = stopped.evaluated_bias + task.evaluated_bias
        trainer.use_kept()
    assert trainer.model.bias.item() == task.evaluated_bias[1] != task.evaluated_bias[-1]
    kept = read_metrics(tmp_path)[-1]
    assert (kept["kept/step"], kept["kept/score"]) == (4, -1.0)
    assert kept["kept/bias"] == task.evaluated_bias[1]
    assert "kept the weights of step 4, the best on held-out images" in caplog.text
    assert caplog.text.count("only memorizes") == 1


@pytest.mark.parametrize(
    ("changes", "scores"), [({"keep": "last"}, SCORES), ({}, ()), ({}, (-2.0, 3.0, 2.0, 0.0))]
)
def test_the_last_weights_are_kept(
    changes: dict[str, Any], scores: tuple[float, ...], tmp_path: Path
) -> None:
    """Where asked for, where evaluations are not compared, and where the last is good enough."""
    task = LineTask(max_steps=4, scores=scores)
    trainer = build_trainer(task, tmp_path, every=1, **changes)
    trainer.train()
    trainer.use_kept()
    assert trainer.model.bias.item() == task.evaluated_bias[-1]


def test_the_latest_good_weights_are_kept(tmp_path: Path) -> None:
    task = LineTask(max_steps=5, scores=(2.0, 1.0, 0.0, -1.0, -0.5))
    trainer = build_trainer(task, tmp_path, every=1)
    trainer.train()
    trainer.use_kept()
    assert trainer.model.bias.item() == task.evaluated_bias[2]
    assert read_metrics(tmp_path)[-1]["kept/step"] == 3


def test_patience_ends_a_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"every": 2, "patience": 2}
    task = LineTask(max_steps=12, scores=SCORES)
    trainer = build_trainer(task, tmp_path, **options)
    trainer.train()
    assert trainer.state.step == 8  # two evaluations after that of step 4
    again = build_trainer(LineTask(max_steps=12, scores=SCORES), tmp_path, **options)
    again.restore(load_checkpoint(tmp_path / "checkpoints/step-00000008"))
    again.train()
    assert again.state.step == 8
    with pytest.raises(UserError, match=r"training\.patience: got 2, expected null: no evaluation"):
        build_trainer(LineTask(), tmp_path, **options)
    with pytest.raises(ValueError, match=r"training\.patience: got 2, expected null with"):
        build_trainer(task, tmp_path, keep="last", **options)


def test_a_batch_is_a_function_of_seed_and_step(tmp_path: Path) -> None:
    task = LineTask(max_steps=5)
    trainer = build_trainer(task, tmp_path, gradient_accumulation_steps=2, seed=3)
    trainer.train()
    order = SampleOrder(16, global_batch_size=4, seed=3)
    for step in range(5):
        assert task.seen[2 * step] + task.seen[2 * step + 1] == order.indices(step).tolist()


def test_a_fresh_folder_is_accepted(tmp_path: Path) -> None:
    refuse_used_folder(tmp_path)
    refuse_used_folder(tmp_path / "missing")


def test_the_reference_task_is_a_task() -> None:
    assert isinstance(LineTask(), Task)


def test_incomplete_process_group_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: gpu)  # none joins
    with pytest.raises(UserError, match="WORLD_SIZE: got 2 from the launcher, but 1 found"):
        build_accelerator("no")


@pytest.mark.parametrize("name", LEFTOVERS)
def test_settings_of_another_project_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``accelerate config`` leaves them; one of them would divide all gradients by 4."""
    for value in (*LEFTOVERS[name], LEFTOVERS[name][0].upper()):
        monkeypatch.setenv(name, value)
        build_accelerator("no")
    value = "4" if name.endswith("STEPS") else "true"
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^{name}: got {value} from the environment, expected "):
        build_accelerator("no")


def test_a_good_run_warns_of_nothing(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level(logging.WARNING):
        build_trainer(LineTask(max_steps=2), tmp_path).train()
    assert caplog.text == ""
