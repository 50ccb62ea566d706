"""Tiny images and models, each in a folder of its own."""

from pathlib import Path

import pytest

from tests.reference import tiny


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "model"
    tiny.build_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, where code of hostile input would leave a file."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """30 images, 25 of them to train on."""
    return tiny.write_data(tmp_path / "data")


@pytest.fixture
def vqvae_dir(tmp_path: Path) -> Path:
    tiny.build_vqvae().save_pretrained(tmp_path / "vqvae")
    return tmp_path / "vqvae"
