"""Tiny data, as a folder."""

from pathlib import Path

import pytest

from tests.reference import tiny


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data") / "images")
