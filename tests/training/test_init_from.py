"""Runs that start from a trained model: its weights, tokenizers and sizes."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from dalle_mini_impl.config import read_config
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.pipeline import TextToImagePipeline
from dalle_mini_impl.training.dalle import DalleRunConfig
from tests.reference import tiny
from tests.training.test_run import assert_resumes_exactly
from vqvae import VQVAE


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model folder; another caption tokenizer and another width than the run's own."""
    folder = tmp_path / "base"
    tiny.build_pipeline(hidden_size=32).save_pretrained(folder)
    return folder


def from_base(
    data: Path, base: Path, out: Path, *, vqvae_dir: str = "", rate: float = 1e-9
) -> DalleRunConfig:
    config = tiny.dalle_run(data, Path("nowhere"), out, learning_rate=rate, ema_decay=0.9)
    return dataclasses.replace(config, vqvae_dir=vqvae_dir, init_from=str(base))


def test_a_decoder_starts_from_the_base(data: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    tiny.train(from_base(data, base, out))
    before, after = (TextToImagePipeline.from_pretrained(path) for path in (base, out / "model"))
    assert after.vqvae.fingerprint() == before.vqvae.fingerprint()
    assert after.text_tokenizer.fingerprint() == before.text_tokenizer.fingerprint()
    for old, new in zip(before.dalle.parameters(), after.dalle.parameters(), strict=True):
        assert torch.allclose(old, new, atol=1e-6)
    # What is written down is what was trained.
    written = read_config(DalleRunConfig, out / "config.yaml")
    assert written.decoder == before.dalle.config.decoder
    assert written.text.text_length == before.text_tokenizer.text_length


def test_it_learns_and_resumes(data: Path, base: Path, tmp_path: Path) -> None:
    assert_resumes_exactly(from_base(data, base, tmp_path / "run", rate=3e-3))
    before, after = (
        TextToImagePipeline.from_pretrained(path) for path in (base, tmp_path / "run/model")
    )
    changed = [
        not torch.equal(old, new)
        for old, new in zip(before.dalle.parameters(), after.dalle.parameters(), strict=True)
    ]
    assert all(changed)


def test_a_tokenizer_starts_from_the_base(data: Path, base: Path, tmp_path: Path) -> None:
    config = tiny.vqvae_run(data, tmp_path / "run", learning_rate=1e-9, vqvae={"channels": (4, 4)})
    tiny.train(dataclasses.replace(config, init_from=str(base)))
    before, after = (
        VQVAE.from_pretrained(base / "vqvae"),
        VQVAE.from_pretrained(tmp_path / "run/model"),
    )
    assert after.config == before.config
    for old, new in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.allclose(old, new, atol=1e-6)


def test_a_tuned_tokenizer_is_taken_with_a_warning(
    data: Path, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tuned = tiny.vqvae_run(data, tmp_path / "vqvae", max_steps=3)
    tiny.train(dataclasses.replace(tuned, init_from=str(base)))
    tiny.train(from_base(data, base, tmp_path / "run", vqvae_dir=str(tmp_path / "vqvae/model")))
    assert "tokens of another image tokenizer" in caplog.text


def test_what_does_not_fit_is_refused(data: Path, base: Path, tmp_path: Path) -> None:
    tiny.build_vqvae(fsq_levels=(5, 3, 3)).save_pretrained(tmp_path / "vqvae")
    with pytest.raises(UserError, match=r"vqvae_dir: got codebook and grid .*leave vqvae_dir out"):
        tiny.train(from_base(data, base, tmp_path / "run", vqvae_dir=str(tmp_path / "vqvae")))
    shutil.rmtree(base / "dalle")
    with pytest.raises(UserError, match="init_from: model: "):
        tiny.train(from_base(data, base, tmp_path / "other"))
    run = tiny.vqvae_run(data, tmp_path / "tokenizer")
    with pytest.raises(UserError, match="init_from: "):
        tiny.train(dataclasses.replace(run, init_from=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="vqvae_dir: got nothing"):
        DalleRunConfig(data=run.data, output_dir="o")
