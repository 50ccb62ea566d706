"""Two real processes do what one does: the same samples, the same losses, the same images."""

import dataclasses
import itertools
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dalle_mini_impl.data.sample_order import SampleOrder
from dalle_mini_impl.training.run import save_config
from dalle_mini_impl.training.vqvae import VQVAETaskConfig
from tests.reference import tiny, training_worker
from tests.reference.commands import run_apart, run_python
from tests.reference.runs import EVERYTHING_RANDOM, TIMES
from vqvae.losses.adversarial import DiscriminatorConfig

# The perplexity is of a process's part: no mean over samples.
NOT_COMPARED = TIMES | {"train/batch_codebook_perplexity"}


def output_of(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def assert_close_metrics(one: Path, two: Path, *, rel: float) -> None:
    """Every number of two runs, but for times: sums over processes come in another order."""
    rows = tiny.read_metrics(one), tiny.read_metrics(two)
    assert len(rows[0]) == len(rows[1])
    for first, second in zip(*rows, strict=True):
        assert first.keys() == second.keys()
        for key in first.keys() - NOT_COMPARED:
            assert second[key] == pytest.approx(first[key], rel=rel, abs=1e-6), key


def write_configs(data: Path, folder: Path, vqvae_dir: Path, **training: Any) -> dict[str, Any]:
    """Configs whose losses do not depend on the process: no dropout of the network."""
    options = {"task": EVERYTHING_RANDOM, "dropout_probability": 0.0, "max_steps": 4}
    dalle = tiny.dalle_run(data, vqvae_dir, folder / "dalle", **options, **training)
    configs = {"vqvae": tiny.vqvae_run(data, folder / "vqvae", max_steps=4), "dalle": dalle}
    folder.mkdir()
    for name, config in configs.items():
        save_config(config, folder / f"{name}.yaml")
    return configs


def images_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [("a red disc",), ("a red disc", "a blue box", "파란 상자")])
def test_generate_on_two_processes(tmp_path: Path, prompts: tuple[str, ...]) -> None:
    tiny.build_pipeline().save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--num-images", "3", "--seed", "2"]
    options += [part for prompt in prompts for part in ("--prompt", prompt)]
    shown = output_of(run_apart("generate", *options, "--out", tmp_path / "two", processes=2))
    assert shown.count("grid: ") == 1  # of the first process alone
    output_of(run_apart("generate", *options, "--out", tmp_path / "one"))
    expected = images_of(tmp_path / "one")
    assert len(expected) == 3 * len(prompts) + 1
    assert images_of(tmp_path / "two") == expected


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tiny.write_data(tmp_path / "data")
    tiny.build_vqvae().save_pretrained(tmp_path / "vqvae")
    pair, alone = tmp_path / "pair", tmp_path / "alone"
    # Recomputed under DDP, kept in one process: the same numbers.
    write_configs(data, pair, tmp_path / "vqvae", activation_checkpointing=True)
    configs = write_configs(data, alone, tmp_path / "vqvae")
    tiny.build_pipeline().save_pretrained(tmp_path / "model")
    shown = output_of(run_python(training_worker.__file__, pair, processes=2))
    lines = sorted(line for line in shown.splitlines() if line.startswith("process"))
    assert lines == ["process 0 of 2", "process 1 of 2"]

    seen = [json.loads((pair / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
    assert [part["world"] for part in seen] == [2, 2]
    order = SampleOrder(16, global_batch_size=8, seed=0)
    for step in range(5):
        batch = [part["ids"][2 * step + index] for part in seen for index in (0, 1)]
        assert [len(micro_batch) for micro_batch in batch] == [2, 2, 2, 2]
        assert list(itertools.chain(*batch)) == order.indices(step).tolist()

    training_worker.fit_a_line(alone / "line")
    for name, config in configs.items():
        tiny.train(config)
        assert len(tiny.losses(alone / name)) == 4
        assert_close_metrics(alone / name, pair / name, rel=1e-5)
    assert tiny.losses(pair / "line") == pytest.approx(tiny.losses(alone / "line"), rel=1e-5)

    training_worker.generate(tmp_path / "model", alone / "images")
    expected = images_of(alone / "images")
    assert len(expected) == 2 * len(training_worker.PROMPTS) + 1
    assert images_of(pair / "images") == expected
    with capsys.disabled():
        print("two processes: " + "; ".join(lines))


@pytest.mark.slow
def test_next_feature_on_two_processes(tmp_path: Path) -> None:
    """Or DDP would refuse the second step. Variances are of a process's part, so not the same."""
    data = tiny.write_data(tmp_path / "data")
    config = tiny.vqvae_run(data, tmp_path / "two", vqvae={"patch_size": 2}, max_steps=4)
    config = dataclasses.replace(
        config,
        task=VQVAETaskConfig(next_feature_weight=0.1),
        discriminator=DiscriminatorConfig(weight=0.1, channels=4, num_layers=2),
    )
    save_config(config, tmp_path / "c.yaml")
    output_of(run_apart("train_vqvae", "--config", tmp_path / "c.yaml", processes=2))
    one = dataclasses.replace(config, output_dir=str(tmp_path / "one"))
    tiny.train(one)
    key = "train/next_feature_loss"
    rows = [tiny.read_metrics(tmp_path / name) for name in ("one", "two")]
    alone, together = ([row[key] for row in part if key in row] for part in rows)
    assert len(together) == 4
    assert together == pytest.approx(alone, rel=0.2)


@pytest.mark.slow
def test_discriminator_on_two_processes(tmp_path: Path) -> None:
    """With the adaptive weight, which both processes must find from the gradients of both."""
    data = tiny.write_data(tmp_path / "data")
    config = tiny.vqvae_run(data, tmp_path / "one", max_steps=4, gradient_clip_norm=0.0)
    critic = DiscriminatorConfig(
        weight=0.8, adaptive=True, feature_matching_weight=1.0, channels=4, num_layers=2
    )
    config = dataclasses.replace(config, discriminator=critic)
    tiny.train(config)
    save_config(dataclasses.replace(config, output_dir=str(tmp_path / "two")), tmp_path / "c.yaml")
    output_of(run_apart("train_vqvae", "--config", tmp_path / "c.yaml", processes=2))
    state = (tmp_path / "two" / "checkpoints" / "step-00000004" / "state.json").read_text()
    assert json.loads(state)["state"]["num_processes"] == 2
    rows = tiny.read_metrics(tmp_path / "one")
    weights = [row["train/generator_weight"] for row in rows if "train/loss" in row]
    assert weights[:2] == [0, 0]
    assert min(weights[2:]) > 0
    assert_close_metrics(tmp_path / "one", tmp_path / "two", rel=1e-4)
