"""A tiny set of images and a tiny tokenizer, for whole runs."""

from pathlib import Path

import pytest

from tests.reference import tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def vqvae_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vqvae")
    tiny.build_vqvae().save_pretrained(folder)
    return folder
