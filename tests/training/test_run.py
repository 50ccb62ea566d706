"""Whole runs: stopped and resumed bit for bit, refused where they would destroy something."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dalle_mini_impl.errors import UserError
from dalle_mini_impl.training.run import save_config
from tests.reference import tiny

EVERYTHING_RANDOM = {
    "caption_dropout_probability": 0.3,
    "token_noise_probability": 0.2,
    "random_order_probability": 0.5,
    "shifted_view_probability": 0.5,
    "augmentation_ends_at": 1.0,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def vqvae_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vqvae")
    tiny.build_vqvae().save_pretrained(folder)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """All tensors of a checkpoint or model folder, byte for byte."""
    found = {path.relative_to(folder): path for path in folder.rglob("*.safetensors")}
    return {str(name): path.read_bytes() for name, path in found.items()}


def results(out: Path) -> dict[str, Any]:
    """Everything that must not depend on whether a run was stopped."""
    checkpoint = out / "checkpoints" / "step-00000006"
    state = json.loads((checkpoint / "state.json").read_text())["state"]
    timeless = {key: value for key, value in state.items() if key != "elapsed_seconds"}
    later = [row for row in tiny.read_metrics(out) if row["step"] > 3]
    figures = [
        {key: value for key, value in row.items() if "second" not in key and "wait" not in key}
        for row in later
    ]
    for row in figures:
        del row["time"]
    return {
        "checkpoint": files_of(checkpoint),
        "state": timeless,
        "model": files_of(out / "model"),
        "figures": figures,
        "pictures": {path.name: path.read_bytes() for path in (out / "samples").glob("*.png")},
    }


def assert_resumes_exactly(config: Any) -> None:
    """Run six steps; then, from the checkpoint of step 3 and with new objects, the last three."""
    out = Path(config.output_dir)
    tiny.train(config)
    straight = results(out)
    assert len(straight["checkpoint"]) >= 3  # model, average, optimizer
    assert len(straight["figures"]) >= 4
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    shutil.rmtree(out / "model")
    _, lines = tiny.train(config, resume="latest")
    assert any(line.startswith("resuming at step 3") for line in lines)
    resumed = results(out)
    assert resumed["figures"] == straight["figures"]
    assert resumed == straight


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_decoder_run_resumes_bit_for_bit(
    data: Path, vqvae_dir: Path, tmp_path: Path, optimizer: str
) -> None:
    config = tiny.dalle_run(
        data,
        vqvae_dir,
        tmp_path / "run",
        task=EVERYTHING_RANDOM,
        optimizer=optimizer,
        ema_decay=0.9,
    )
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, balance_by="color")
    )
    assert_resumes_exactly(config)


@pytest.mark.parametrize("quantizer", ["fsq", "vq", "gumbel"])
def test_a_tokenizer_run_resumes_bit_for_bit(data: Path, tmp_path: Path, quantizer: str) -> None:
    config = tiny.vqvae_run(
        data, tmp_path / "run", vqvae={"quantizer": quantizer}, ema_decay=0.9, schedule="cosine"
    )
    config = dataclasses.replace(config, task=dataclasses.replace(config.task, max_shift=2))
    assert_resumes_exactly(config)
