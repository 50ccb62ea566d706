"""Fault tests 7 to 10: a run may stop at any step, and resume on any number of processes."""

import dataclasses
import itertools
import json
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dalle_mini_impl.data.sample_order import SampleOrder
from dalle_mini_impl.errors import StoppedError
from dalle_mini_impl.training.clip import ClipRunConfig
from dalle_mini_impl.training.vqvae import VQVAETaskConfig
from tests.reference import line_runs, tiny
from tests.reference.line_task import LineTask, build_trainer
from tests.reference.log_lines import log_lines
from tests.reference.processes import Script, run_script
from tests.reference.runs import EVERYTHING_RANDOM, config_file, run_results
from vqvae.losses.adversarial import DiscriminatorConfig

STEPS = 8  # 25 training images in batches of 8: the epoch ends within the fourth
OPTIONS: dict[str, Any] = {"max_steps": STEPS, "every": 4, "checkpoint_every_steps": 1}
OPTIONS |= {"gradient_accumulation_steps": 2, "ema_decay": 0.9}


def stop_after_every_step(config: Any) -> None:
    """Train with new objects for each step: a signal comes as soon as it is done."""

    def stop(line: str) -> None:
        if "  step " in line:
            signal.raise_signal(signal.SIGTERM)

    resume = None
    for step in range(1, STEPS + 1):
        expected = f"stopped after step {step}, with a checkpoint"
        with log_lines(stop) as lines, pytest.raises(StoppedError, match=expected):
            tiny.train(config, resume=resume)
        assert (resume is None) or any(f"resuming at step {step - 1} " in line for line in lines)
        resume = "latest"
    tiny.train(config, resume="latest")  # the evaluation of the last step, and the model


def assert_the_same_stopped_or_not(config: Any, tmp_path: Path) -> None:
    out = Path(config.output_dir)
    # Of an optimizer's state, the options are the rates of its last step: each step sets its own.
    without = ("config", "optimizer_0", "optimizer_1")
    tiny.train(config)
    straight = run_results(out, STEPS, without=without)
    shutil.move(out, tmp_path / "straight")
    stop_after_every_step(config)
    stopped = run_results(out, STEPS, without=without)
    for name, value in straight.items():
        assert stopped[name] == value, name
    assert straight["checkpoint"]
    assert straight["model"]
    assert straight["images"] or isinstance(config, ClipRunConfig)


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", ["fsq", "vq", "gumbel"])
def test_a_tokenizer_run_stopped_after_every_step(
    data: Path, tmp_path: Path, quantizer: str
) -> None:
    config = tiny.vqvae_run(data, tmp_path / "run", vqvae={"quantizer": quantizer}, **OPTIONS)
    assert_the_same_stopped_or_not(config, tmp_path)


@pytest.mark.slow
def test_a_run_with_all_losses_stopped_after_every_step(data: Path, tmp_path: Path) -> None:
    config = tiny.vqvae_run(data, tmp_path / "run", vqvae={"quantizer": "vq"}, **OPTIONS)
    weights = {"perceptual_weight": 0.5, "next_feature_weight": 0.1}
    task = VQVAETaskConfig(perturbed_image_fraction=0.5, **weights)
    gan = {"weight": 0.8, "adaptive": True, "feature_matching_weight": 1.0}
    discriminator = DiscriminatorConfig(channels=4, num_layers=2, **gan)  # type: ignore[arg-type]
    config = dataclasses.replace(config, task=task, discriminator=discriminator)
    assert_the_same_stopped_or_not(config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon", "muon with encoder"])
def test_a_decoder_run_stopped_after_every_step(
    data: Path, vqvae_dir: Path, tmp_path: Path, name: str
) -> None:
    options = OPTIONS | {"task": EVERYTHING_RANDOM, "optimizer": name.removesuffix(" with encoder")}
    options |= {"decoder": tiny.WITH_ENCODER if "encoder" in name else {}}
    config = tiny.dalle_run(data, vqvae_dir, tmp_path / "run", **options)
    assert_the_same_stopped_or_not(config, tmp_path)


@pytest.mark.slow
def test_a_published_decoder_stopped_after_every_step(
    data: Path, vqvae_dir: Path, tmp_path: Path
) -> None:
    """Masks, BPE dropout and enlarged views: made again at each resume, and always the same."""
    task = {"shifted_view_probability": 1.0, "augmentation_ends_at": 1.0}
    task |= {"bpe_dropout_probability": 0.3}
    decoder = {"attention": "dalle", "kernel_size": 3, "block": "gelu"}
    decoder |= {"has_target_positions": False}
    config = tiny.dalle_run(
        data, vqvae_dir, tmp_path / "run", task=task, decoder=decoder, **OPTIONS
    )
    config = dataclasses.replace(config, max_zoom=1.25)
    assert_the_same_stopped_or_not(config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_clip_run_stopped_after_every_step(data: Path, tmp_path: Path, loss: str) -> None:
    config = tiny.clip_run(data, tmp_path / "run", loss=loss, **OPTIONS)
    assert_the_same_stopped_or_not(config, tmp_path)


def test_threads_change_no_sample(tmp_path: Path) -> None:
    """There are no data workers: one thread makes the batches, whatever the model's threads do."""
    seen, losses = [], []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        task = LineTask(max_steps=12)
        build_trainer(task, tmp_path / str(threads)).train()
        seen.append(task.seen)
        losses.append(tiny.losses(tmp_path / str(threads)))
    torch.set_num_threads(1)
    assert seen[0] == seen[1] == seen[2]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] == pytest.approx(losses[2], rel=1e-6)


@given(num_samples=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 2**62))
def test_no_sample_is_lost_or_repeated_in_an_epoch(
    num_samples: int, batch_size: int, seed: int
) -> None:
    """Also where the data set is smaller than a batch, or no multiple of it."""
    order = SampleOrder(num_samples, global_batch_size=batch_size, seed=seed)
    steps = -(-3 * num_samples // batch_size)
    stream = list(itertools.chain(*(order.indices(step).tolist() for step in range(steps))))
    for epoch in range(3):
        part = stream[epoch * num_samples : (epoch + 1) * num_samples]
        assert Counter(part) == Counter(range(num_samples))


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_resumes_on_other_processes(tmp_path: Path, before: int, after: int) -> None:
    """The same samples in the same steps; sums in another order, so losses to 1e-5."""
    worker = line_runs.__file__
    run_script(worker, tmp_path / "straight", "0", "20")
    run_script(worker, tmp_path / "moved", "0", "10", processes=before)
    run_script(worker, tmp_path / "moved", "10", "20", processes=after)
    order = SampleOrder(LineTask.num_samples, global_batch_size=8, seed=0)
    for start, stop, processes in ((0, 10, before), (10, 20, after)):
        files = [tmp_path / "moved" / f"seen-{start}-{rank}.json" for rank in range(processes)]
        parts = [json.loads(file.read_text()) for file in files]
        assert [part["world"] for part in parts] == [processes] * processes
        for step in range(start, stop):
            ids = [number for part in parts for number in part["ids"][step - start]]
            assert ids == order.indices(step).tolist()
    one, two = tiny.losses(tmp_path / "straight"), tiny.losses(tmp_path / "moved")
    assert len(one) == len(two) == 20
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_indivisible_batch_is_refused(data: Path, tmp_path: Path) -> None:
    config = config_file(tiny.vqvae_run(data, tmp_path / "run", global_batch_size=9))
    script = Script("scripts/train_vqvae.py", "--config", config, processes=2)
    code, _ = script.finish()
    assert code != 0
    expected = "training.global_batch_size: got 9, expected a multiple of 2 (2 processes x 1"
    assert expected in script.all_output()
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
