"""Fault test 14: a run resumes with the settings it began with, or names the changed ones."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from dalle_mini_impl.errors import UserError
from dalle_mini_impl.training.dalle import DalleRunConfig
from tests.reference import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a tokenizer, and a decoder run of three steps."""
    folder = tmp_path_factory.mktemp("changed")
    tiny.write_data(folder / "data")
    tiny.build_vqvae().save_pretrained(folder / "vqvae")
    tiny.train(base(folder))
    return folder


def base(folder: Path) -> DalleRunConfig:
    options = {"max_steps": 3, "ema_decay": 0.9}
    return tiny.dalle_run(folder / "data", folder / "vqvae", folder / "run", **options)


def changed(config: Any, path: str, value: Any) -> Any:
    """The same config but for one field, given by its dotted path."""
    name, _, rest = path.partition(".")
    if rest:
        value = changed(getattr(config, name), rest, value)
    return dataclasses.replace(config, **{name: value})


REFUSED: dict[str, Any] = {
    "training.seed": 1,
    "training.global_batch_size": 4,
    "training.optimizer": "muon",
    "training.ema_decay": 0.5,
    "decoder.hidden_size": 32,
    "decoder.num_layers": 1,
    "decoder.num_heads": 1,
    "decoder.dropout_probability": 0.0,
    "decoder.positions": "learned",
    "text.vocab_size": 280,
    "text.text_length": 9,
    "task.caption_dropout_probability": 0.5,
    "task.token_noise_probability": 0.1,
    "num_views": 1,
    "max_shift": 1,
    "data.balance_by": "color",
    "data.caption_columns": ("texts",),
    "data.captions_from": "text:a box",
    "data.image_column": "file_name",
}
ALLOWED: dict[str, Any] = {
    "training.max_steps": 4,
    "training.max_minutes": 100.0,
    "training.learning_rate": 1e-4,
    "training.weight_decay": 0.1,
    "training.schedule": "cosine",
    "training.warmup_steps": 1,
    "training.gradient_accumulation_steps": 2,
    "training.log_every_steps": 2,
    "training.checkpoint_every_steps": 7,
    "fixed_prompts": ("a green box",),
    "sampling.temperature": 0.5,
    "tracking.run_name": "again",
    "data.max_bad_fraction": 0.5,
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_of_another_run_are_refused(folder: Path, name: str) -> None:
    before = (folder / "run" / "config.yaml").read_bytes()
    config = changed(base(folder), name, REFUSED[name])
    with pytest.raises(UserError) as caught:
        tiny.train(config, resume="latest")
    message = str(caught.value)
    assert message.startswith("resume: ")
    assert "step-00000003 does not fit this config: " in message
    assert f"{name} was " in message
    assert message.count(" was ") == 1 + message.count(" was started")
    assert (folder / "run" / "config.yaml").read_bytes() == before


def test_another_split_is_refused_for_its_images(folder: Path) -> None:
    config = changed(base(folder), "data.train_split", "val")
    with pytest.raises(UserError, match="25 of the 25 images that this run began with are gone"):
        tiny.train(config, resume="latest")


def test_all_changed_settings_are_listed(folder: Path) -> None:
    config = base(folder)
    for name in ("training.seed", "num_views", "training.learning_rate"):
        config = changed(config, name, (REFUSED | ALLOWED)[name])
    expected = "num_views was 2, is 1; training.seed was 0, is 1; expected"
    with pytest.raises(UserError, match=expected):
        tiny.train(config, resume="latest")


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed_changes_are_logged(folder: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    config = changed(base(folder), "output_dir", str(tmp_path / "run"))
    config = changed(changed(config, "training.max_steps", 4), name, ALLOWED[name])
    _, lines = tiny.train(config, resume="latest")
    assert any(line.startswith(f"changed since: {name} was ") for line in lines)
    assert tiny.read_metrics(tmp_path / "run")[-1]["step"] == 4


def test_another_number_of_samples_is_refused(data: Path, tmp_path: Path) -> None:
    config = tiny.vqvae_run(data, tmp_path / "run", max_steps=3)
    tiny.train(config)
    lines = (data / "metadata.jsonl").read_text().splitlines()
    (data / "metadata.jsonl").write_text("\n".join(lines[1:]) + "\n")
    (data / "0.png").unlink()
    (tmp_path / "run" / "images-train.jsonl").unlink()  # somebody deleted the list
    with pytest.raises(UserError, match="was trained on 25 samples, now there are 24"):
        tiny.train(changed(config, "training.max_steps", 6), resume="latest")
