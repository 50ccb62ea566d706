"""Shared fixtures: tiny models, one thread, and checks of types and shapes in every test."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook

# Before anything imports the two packages: beartype checks all their type hints, and jaxtyping all
# their shapes, at every call.
install_import_hook(["dalle_mini_impl", "vqvae"], "beartype.beartype")

# Tests that run beside each other, and the commands that they start, share the processors: threads
# that wait for each other there made a training ten times as slow as one thread alone.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(workers)))

import torch  # noqa: E402

from tests.reference.other_rounding import OtherRounding  # noqa: E402

if TYPE_CHECKING:
    from dalle_mini_impl.models.text_to_image import TextToImageModel
    from vqvae import VQVAE

# The same examples in every run; no deadline, since a busy machine is no failure.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with what takes minutes, so that no process is left alone with it at the end."""
    usual = float(config.getini("timeout"))

    def seconds(item: pytest.Item) -> float:
        marker = item.get_closest_marker("timeout")
        # Others stay together, as their modules share what they set up.
        return max(usual, marker.args[0] if marker else 0)

    items.sort(key=seconds, reverse=True)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tensors here are so small that a second thread makes them slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def rounding() -> Iterator[None]:
    """With `TEST_ROUNDING=1` in the environment, as a processor that does not exist would."""
    if not (seed := os.environ.get("TEST_ROUNDING")):
        yield
        return
    with OtherRounding(int(seed)):
        yield


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A C++ compiler, and one folder for what all tests compile with it."""
    from dalle_mini_impl.native import build

    if not any(map(shutil.which, build.COMPILERS)):
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each process has a folder in that of the session
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "compiled"))
        build.load_library.cache_clear()
        yield
        build.load_library.cache_clear()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """For tests that pass wrong types on purpose, to test our own checks."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as a run leaves it: its own name is `model`."""
    from tests.reference import tiny

    folder = tmp_path_factory.mktemp("run") / "model"
    tiny.build_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def build_dalle() -> Callable[..., "TextToImageModel"]:
    """A function that builds a tiny decoder whose logits differ widely (fresh heads are zero)."""
    from dalle_mini_impl.models.dalle_config import DalleConfig, DecoderConfig
    from dalle_mini_impl.models.text_to_image import TextToImageModel, build_text_to_image
    from tests.reference.random_weights import randomize

    def build(*, seed: int = 0, **changes: Any) -> TextToImageModel:
        decoder: dict[str, Any] = {"hidden_size": 32, "num_layers": 2, "num_heads": 2}
        sizes: dict[str, Any] = {
            "vocab_size": 11,
            "text_length": 5,
            "codebook_levels": (4, 3),
            "image_grid_size": (3, 4),
        }
        for name, value in changes.items():
            (sizes if name in sizes else decoder)[name] = value
        model = build_text_to_image(DalleConfig(decoder=DecoderConfig(**decoder), **sizes)).eval()
        randomize(model, seed=seed, scale=0.15)
        return model

    return build


@pytest.fixture(scope="session")
def build_vqvae() -> Callable[..., "VQVAE"]:
    """A function that builds a tiny image tokenizer in which every weight matters."""
    from tests.reference.random_weights import randomize
    from vqvae import VQVAE, VQVAEConfig

    def build(*, seed: int = 0, **changes: Any) -> VQVAE:
        sizes: dict[str, Any] = {
            "image_size": 16,
            "patch_size": 2,
            "channels": (8, 12),
            "num_encoder_blocks": 1,
            "num_decoder_blocks": 1,
            "fsq_levels": (4, 3, 3),
            "vq_codebook_size": 20,
            "vq_code_dim": 4,
        }
        model = VQVAE(VQVAEConfig(**(sizes | changes))).eval()
        randomize(model, seed=seed)
        return model

    return build
