"""`training.activation_checkpointing` changes what is kept in memory, and no number of any run."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dalle_mini_impl.data.check import check_data
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.training import estimate
from dalle_mini_impl.transformer import blocks
from tests.reference import tiny
from tests.reference.runs import EVERYTHING_RANDOM, checkpoint_dir, read_files

RANDOM: dict[str, Any] = {"task": EVERYTHING_RANDOM}  # and the network's dropout
WITH_ENCODER = RANDOM | {"decoder": tiny.WITH_ENCODER}


@pytest.fixture
def recomputed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows with each pass of a block that will be computed again."""
    calls: list[Any] = []

    def checkpoint(run: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(run)
        return torch.utils.checkpoint.checkpoint(run, *arguments, **options)

    monkeypatch.setattr(blocks, "checkpoint", checkpoint)
    return calls


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder", "translation", "vit", "clip"])
def test_runs_are_the_same_bit_for_bit(
    kind: str, data: Path, vqvae_dir: Path, tmp_path: Path, recomputed: list[Any]
) -> None:
    builds: dict[str, Callable[..., Any]] = {
        "decoder": partial(tiny.dalle_run, data, vqvae_dir, **RANDOM),
        "encoder_decoder": partial(tiny.dalle_run, data, vqvae_dir, **WITH_ENCODER),
        "translation": partial(tiny.translation_run, tiny.write_text_pairs(tmp_path / "pairs.tsv")),
        "vit": partial(tiny.vit_run, data),
        "clip": partial(tiny.clip_run, data),
    }
    found = []
    for flag in (False, True):
        out = tmp_path / str(flag)
        options = {"gradient_accumulation_steps": 2, "max_steps": 3}
        tiny.train(builds[kind](out, activation_checkpointing=flag, **options))
        found.append((read_files(checkpoint_dir(out, 3)), tiny.losses(out)))
        # 3 steps of 2 micro-batches, through the towers' or the encoder's block and one or two more
        num_blocks = {"encoder_decoder": 3, "vit": 1}.get(kind, 2)
        assert len(recomputed) == (6 * num_blocks if flag else 0)
    assert len(found[0][0]) >= 2
    assert found[0] == found[1]


def test_models_without_our_blocks_refuse_it(data: Path, tmp_path: Path) -> None:
    message = r"^training.activation_checkpointing: got true, expected false: "
    with pytest.raises(ValueError, match=message + "the image tokenizer"):
        tiny.vqvae_run(data, tmp_path / "vqvae", activation_checkpointing=True)
    options = {"implementation": "transformers", "activation_checkpointing": True}
    theirs = tiny.vit_run(data, tmp_path / "vit", **options)
    with pytest.raises(UserError, match=message + "TransformersViT has none"):
        tiny.train(theirs)


def test_an_estimate_times_what_will_run(
    data: Path, vqvae_dir: Path, tmp_path: Path, recomputed: list[Any]
) -> None:
    config = tiny.dalle_run(data, vqvae_dir, tmp_path)
    vqvae = estimate.tokenizer_of(config, None)
    report = check_data(str(data), pixel_size=tiny.PIXEL_SIZE, text_length=8, vocab_size=300)
    assert vqvae is not None
    for flag in (False, True):
        training = dataclasses.replace(config.training, activation_checkpointing=flag)
        changed = dataclasses.replace(config, training=training)
        lines = estimate.estimate_lines(changed, vqvae, report)
        assert any(line.startswith("weights, gradients and optimizer: ") for line in lines)
        assert bool(recomputed) == flag
