"""Fault test 22: memory that runs out is one line, and `find_batch_size` finds what fits."""

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dalle_mini_impl.errors import UserError
from dalle_mini_impl.hardware import is_out_of_memory
from dalle_mini_impl.training.batch_size import fewest_parts_that_fit
from dalle_mini_impl.training.checkpoint import load_checkpoint, newest_checkpoint
from tests.reference import tiny
from tests.reference.processes import Script
from tests.reference.runs import config_file
from vqvae.losses.adversarial import DiscriminatorConfig

needs_limits = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
# The libraries are there already: what is limited is what the work itself takes.
LIMITED = """
import resource, runpy, sys
import datasets, torch, transformers, dalle_mini_impl.cli.generate, dalle_mini_impl.training.vqvae
torch.set_num_threads(1)
(torch.ones(64, 64) @ torch.ones(64, 64)).sum()
megabytes = int(sys.argv[1])
sys.argv = sys.argv[2:]
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + megabytes * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def write_config(folder: Path, **training: object) -> Path:
    """A tokenizer run whose batch of 512 images of 64 pixels needs gigabytes."""
    sizes = {"image_size": 64, "channels": (64, 96), "patch_size": 2}
    options = {"max_steps": 2, "global_batch_size": 512, "every": 100, "checkpoint_every_steps": 1}
    data = tiny.write_data(folder / "data")
    return config_file(tiny.vqvae_run(data, folder / "run", vqvae=sizes, **options, **training))


@needs_limits
@pytest.mark.slow
def test_out_of_memory_names_the_options_to_lower(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    script = Script("-c", LIMITED, "800", "scripts/train_vqvae.py", "--config", config)
    code, _ = script.finish()
    assert code == 2, script.all_output()
    assert len(script.err) == 1
    for part in (
        "training: out of memory after step 0; raise training.gradient_accumulation_steps (now 1)",
        "--training.find_batch_size true",
        "training.global_batch_size (now 512)",
    ):
        assert part in script.err[0]
    assert newest_checkpoint(tmp_path / "run" / "checkpoints") is None


@needs_limits
@pytest.mark.slow
def test_the_largest_micro_batch_is_found_and_kept(tmp_path: Path) -> None:
    config = write_config(tmp_path, find_batch_size=True)
    command = ("-c", LIMITED, "1600", "scripts/train_vqvae.py", "--config", config)
    script = Script(*command)
    code, _ = script.finish(seconds=240)
    assert code == 0, script.all_output()
    match = script.wait_for(r"micro-batches of (\d+): training.gradient_accumulation_steps (\d+)")
    size, parts = map(int, match.groups())
    assert size * parts == 512
    assert parts > 1
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["training"]
    assert kept["gradient_accumulation_steps"] == parts
    assert kept["global_batch_size"] == 512
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000002")
    assert checkpoint.state["config"]["training"]["gradient_accumulation_steps"] == parts

    # With all the memory of the machine it goes on with what it began with, bit for bit.
    resumed = Script("scripts/train_vqvae.py", "--config", config, "--resume", "latest")
    assert resumed.finish()[0] == 0, resumed.all_output()
    assert f"training.gradient_accumulation_steps {parts}" in resumed.all_output()


@pytest.mark.parametrize(
    ("vqvae", "discriminator"),
    [
        ({"quantizer": "vq"}, {}),  # codes learn by being used; the first batch places them
        ({}, {"weight": 0.1, "adaptive": True, "starts_at": 0.0, "num_layers": 1}),
    ],
)
def test_looking_for_what_fits_changes_no_number(
    vqvae: dict[str, Any], discriminator: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    losses = []
    for looks in (False, True):
        options = {"vqvae": vqvae, "max_steps": 3, "find_batch_size": looks}
        config = replace(
            tiny.vqvae_run(data, tmp_path / str(looks), **options),
            discriminator=DiscriminatorConfig(**discriminator),
        )
        resource.setrlimit(resource.RLIMIT_AS, (2**42, hard))  # a limit, but a wide one
        try:
            _, lines = tiny.train(config)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        assert any(line.startswith("micro-batches of 8:") for line in lines) == looks
        losses.append(tiny.losses(tmp_path / str(looks)))
    assert losses[0] == losses[1]


def test_without_a_limit_a_cpu_is_not_probed(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Linux would end the process, and perhaps another one."""
    with caplog.at_level(logging.WARNING):
        tiny.train(tiny.vqvae_run(data, tmp_path / "run", max_steps=1, find_batch_size=True))
    assert "training.find_batch_size: passed over" in caplog.text


def test_the_fewest_parts_that_fit() -> None:
    tried: list[int] = []

    def attempt(size: int, largest: int = 20) -> None:
        tried.append(size)
        if size > largest:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    assert fewest_parts_that_fit(64, attempt) == 4
    assert tried == [64, 32, 16]
    assert fewest_parts_that_fit(60, attempt) == 3
    assert fewest_parts_that_fit(7, attempt) == 1
    with pytest.raises(UserError, match="not even one sample fits into memory"):
        fewest_parts_that_fit(6, lambda size: attempt(size, largest=0))

    def broken(size: int) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        fewest_parts_that_fit(6, broken)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("shapes differ"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_what_counts_as_out_of_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) == expected
