"""A tiny model and tiny data, as folders."""

from pathlib import Path

import pytest

from tests.reference import tiny


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as a run leaves it: its own name is `model`."""
    folder = tmp_path_factory.mktemp("run") / "model"
    tiny.build_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data") / "images")
