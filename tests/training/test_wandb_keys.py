"""What two real runs leave in W&B's own file: every figure, image and file that is promised."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb

from tests.reference import tiny
from tests.reference.wandb_file import WandbFile, read_wandb_file

OF_EVERY_RUN = {
    "trainer/global_step",
    "progress",
    "train/loss",
    "train/learning_rate",
    "train/gradient_norm",
    "train/samples_per_second",
    "train/tokens_per_second",
    "train/data_wait_fraction",
    "train/save_fraction",
}
OF_A_TOKENIZER = {
    "train/reconstruction_loss",
    "train/psnr_db",
    "train/batch_codebook_perplexity",
    "validation/psnr_db",
    "validation/codebook_usage",
    "validation/codebook_perplexity",
}
OF_A_DECODER = {
    "train/image_nats",
    "train/text_nats",
    "validation/image_nats",
    "validation/image_nats_null_caption",
    "validation/text_nats",
    "validation/log_likelihood_ratio_nats",
    "validation/memorization_gap_nats",
    "baseline/image_uniform_nats",
    "baseline/image_unigram_nats",
    "baseline/text_uniform_nats",
    "baseline/text_unigram_nats",
}


@pytest.fixture(autouse=True)
def own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A user with no W&B account, no settings and no other runs."""
    for name in os.environ:
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(home))
    wandb.teardown()
    yield
    wandb.teardown()


def recorded(out: Path) -> WandbFile:
    wandb.teardown()  # its process may still be writing
    (folder,) = (out / "wandb").glob("offline-run-*")
    return read_wandb_file(folder)


def test_everything_promised_is_in_the_file(tmp_path: Path) -> None:
    data = tiny.write_data(tmp_path / "data")
    vqvae = tiny.vqvae_run(data, tmp_path / "vqvae", tracking="offline")
    vqvae_dir, _ = tiny.train(vqvae)
    dalle = tiny.dalle_run(data, vqvae_dir, tmp_path / "dalle", tracking="offline")
    tiny.train(dalle)

    found = recorded(tmp_path / "vqvae")
    history = found["history"]
    assert history.keys() >= OF_EVERY_RUN | OF_A_TOKENIZER
    assert len(history["train/loss"]) == 6
    assert len(history["validation/codebook_usage"]) == 2
    assert history["reconstructions.captions"][0] == ["original", "reconstruction"] * 5
    assert history["reconstructions.count"] == [10, 10]
    assert found["config"]["vqvae"]["channels"] == [8, 12]
    assert found["config"]["training"]["max_steps"] == 6
    artifact = [name for name in found["files"] if name.startswith("artifact:model/")]
    assert {name.split("/")[-1] for name in artifact} >= {"config.json", "model.safetensors"}

    found = recorded(tmp_path / "dalle")
    history = found["history"]
    assert history.keys() >= OF_EVERY_RUN | OF_A_DECODER
    assert history["samples.captions"] == [["a red disc", "a blue box"]] * 2
    images = [name for name in found["files"] if name.startswith("media/images/samples")]
    assert len(images) >= 2
    assert found["config"]["decoder"]["hidden_size"] == 16
    assert found["config"]["fixed_prompts"] == ["a red disc", "a blue box"]
    artifact = [name for name in found["files"] if name.startswith("artifact:model/")]
    assert any(name.endswith("/model_index.json") for name in artifact)
    assert any(name.endswith("/vqvae/model.safetensors") for name in artifact)

    # metrics.jsonl is the truth: W&B has every number of it.
    for row in tiny.read_metrics(tmp_path / "dalle"):
        for key in row.keys() - {"step", "time"}:
            assert row[key] in history[key], key
