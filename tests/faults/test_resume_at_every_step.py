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
from dalle_mini_impl.training.clip import ClipRunConfig, train_clip
from dalle_mini_impl.training.dalle import DalleRunConfig, train_dalle
from dalle_mini_impl.training.run import save_config
from dalle_mini_impl.training.vqvae import VQVAERunConfig, VQVAETaskConfig, train_vqvae
from tests.reference import line_runs, tiny
from tests.reference.line_task import LineTask, build_trainer
from tests.reference.log_lines import log_lines
from tests.reference.processes import Script, run_script
from tests.reference.runs import EVERYTHING_RANDOM, run_results
from vqvae.losses.adversarial import DiscriminatorConfig

STEPS = 8  # 25 training images in batches of 8: the epoch ends within the fourth
OPTIONS: dict[str, Any] = {
    "max_steps": STEPS,
    "gradient_accumulation_steps": 2,
    "ema_decay": 0.9,
    "checkpoint_every_steps": 1,
    "evaluate_every_steps": 4,
    "sample_every_steps": 4,
}


def stop_after_every_step(config: Any) -> None:
    """Trains with new objects for each step: a signal comes as soon as it is done."""
    runs = {VQVAERunConfig: train_vqvae, DalleRunConfig: train_dalle, ClipRunConfig: train_clip}
    run: Any = runs[type(config)]
    resume = None
    for step in range(1, STEPS + 1):

        def stop(line: str) -> None:
            if "  step " in line:
                signal.raise_signal(signal.SIGTERM)

        with pytest.raises(StoppedError, match=f"stopped after step {step}, with a checkpoint"):
            with log_lines(stop) as lines:
                run(config, resume=resume)
        assert (resume is None) or any(f"resuming at step {step - 1} " in line for line in lines)
        resume = "latest"
    run(config, resume="latest")  # the evaluation of the last step, and the model


def assert_the_same_stopped_or_not(config: Any, tmp_path: Path) -> None:
    precision = torch.get_float32_matmul_precision()
    out = Path(config.output_dir)
    # Of an optimizer's state, the options are the rates of its last step: each step sets its own.
    without = ("config", "optimizer_0", "optimizer_1")
    tiny.train(config)
    straight = run_results(out, STEPS, without=without)
    shutil.move(out, tmp_path / "straight")
    stop_after_every_step(config)
    torch.set_float32_matmul_precision(precision)
    stopped = run_results(out, STEPS, without=without)
    for name, value in straight.items():
        assert stopped[name] == value, name
    assert straight["checkpoint"]
    assert straight["model"]
    assert straight["images"] or isinstance(config, ClipRunConfig)


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", ["fsq", "vq", "gumbel"])
def test_a_tokenizer_run_stopped_after_every_step(tmp_path: Path, quantizer: str) -> None:
    data = tiny.write_data(tmp_path / "data")
    config = tiny.vqvae_run(data, tmp_path / "run", vqvae={"quantizer": quantizer}, **OPTIONS)
    assert_the_same_stopped_or_not(config, tmp_path)


@pytest.mark.slow
def test_a_run_with_all_losses_stopped_after_every_step(tmp_path: Path) -> None:
    data = tiny.write_data(tmp_path / "data")
    config = tiny.vqvae_run(data, tmp_path / "run", vqvae={"quantizer": "vq"}, **OPTIONS)
    config = dataclasses.replace(
        config,
        task=VQVAETaskConfig(
            perturbed_image_fraction=0.5, perceptual_weight=0.5, next_feature_weight=0.1
        ),
        discriminator=DiscriminatorConfig(
            weight=0.8, adaptive=True, feature_matching_weight=1.0, channels=4, num_layers=2
        ),
    )
    assert_the_same_stopped_or_not(config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "decoder"), [("adamw", {}), ("muon", {}), ("muon", tiny.WITH_ENCODER)]
)
def test_a_decoder_run_stopped_after_every_step(
    tmp_path: Path, optimizer: str, decoder: dict[str, Any]
) -> None:
    data = tiny.write_data(tmp_path / "data")
    tiny.build_vqvae().save_pretrained(tmp_path / "vqvae")
    config = tiny.dalle_run(
        data,
        tmp_path / "vqvae",
        tmp_path / "run",
        task=EVERYTHING_RANDOM,
        decoder=decoder,
        optimizer=optimizer,
        **OPTIONS,
    )
    assert_the_same_stopped_or_not(config, tmp_path)


@pytest.mark.slow
def test_a_published_decoder_stopped_after_every_step(tmp_path: Path) -> None:
    """Masks, BPE dropout and enlarged views: made again at each resume, and always the same."""
    data = tiny.write_data(tmp_path / "data")
    tiny.build_vqvae().save_pretrained(tmp_path / "vqvae")
    task = {"shifted_view_probability": 1.0, "augmentation_ends_at": 1.0}
    config = tiny.dalle_run(
        data,
        tmp_path / "vqvae",
        tmp_path / "run",
        task=task | {"bpe_dropout_probability": 0.3},
        **OPTIONS,
    )
    decoder = dataclasses.replace(
        config.decoder, attention="dalle", kernel_size=3, block="gelu", has_target_positions=False
    )
    config = dataclasses.replace(config, decoder=decoder, max_zoom=1.25)
    assert_the_same_stopped_or_not(config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_clip_run_stopped_after_every_step(tmp_path: Path, loss: str) -> None:
    data = tiny.write_data(tmp_path / "data")
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
        parts = [
            json.loads((tmp_path / "moved" / f"seen-{start}-{rank}.json").read_text())
            for rank in range(processes)
        ]
        assert [part["world"] for part in parts] == [processes] * processes
        for step in range(start, stop):
            ids = [number for part in parts for number in part["ids"][step - start]]
            assert ids == order.indices(step).tolist()
    one, two = tiny.losses(tmp_path / "straight"), tiny.losses(tmp_path / "moved")
    assert len(one) == len(two) == 20
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_indivisible_batch_is_refused(tmp_path: Path) -> None:
    data = tiny.write_data(tmp_path / "data")
    config = tiny.vqvae_run(data, tmp_path / "run", global_batch_size=9)
    save_config(config, tmp_path / "run.yaml")
    script = Script("scripts/train_vqvae.py", "--config", tmp_path / "run.yaml", processes=2)
    code, _ = script.finish()
    assert code != 0
    assert "training.global_batch_size: got 9, expected a multiple of 2 (2 processes x 1" in (
        script.all_output()
    )
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
