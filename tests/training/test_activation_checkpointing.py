"""`training.activation_checkpointing` changes what is kept in memory, and no number of any run."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dalle_mini_impl.data.check import check_data
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.training import estimate
from dalle_mini_impl.transformer import blocks
from tests.reference import tiny

RANDOM = {
    "caption_dropout_probability": 0.3,
    "token_noise_probability": 0.2,
    "random_order_probability": 0.5,
    "augmentation_ends_at": 1.0,
}


def decoder_run(
    data: Path, vqvae_dir: Path, out: Path, *, decoder: dict[str, Any], **training: Any
) -> Any:
    """With everything that is random, the network's dropout too."""
    return tiny.dalle_run(data, vqvae_dir, out, task=RANDOM, decoder=decoder, **training)


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
        "decoder": lambda *a, **o: decoder_run(data, vqvae_dir, *a, decoder={}, **o),
        "encoder_decoder": lambda *a, **o: decoder_run(
            data, vqvae_dir, *a, decoder=tiny.WITH_ENCODER, **o
        ),
        "translation": lambda *a, **o: tiny.translation_run(
            tiny.write_text_pairs(tmp_path / "pairs.tsv"), *a, **o
        ),
        "vit": lambda *a, **o: tiny.vit_run(data, *a, **o),
        "clip": lambda *a, **o: tiny.clip_run(data, *a, **o),
    }
    found = []
    for flag in (False, True):
        out = tmp_path / str(flag)
        config = builds[kind](
            out, activation_checkpointing=flag, gradient_accumulation_steps=2, max_steps=3
        )
        tiny.train(config)
        checkpoint = out / "checkpoints" / "step-00000003"
        found.append(
            {path.name: path.read_bytes() for path in sorted(checkpoint.glob("*.safetensors"))}
        )
        found[-1]["losses"] = repr(tiny.losses(out)).encode()
        # 3 steps of 2 micro-batches, through the towers' or the encoder's block and one or two more
        num_blocks = {"encoder_decoder": 3, "vit": 1}.get(kind, 2)
        assert len(recomputed) == (6 * num_blocks if flag else 0)
    assert len(found[0]) >= 3
    assert found[0] == found[1]


def test_models_without_our_blocks_refuse_it(data: Path, tmp_path: Path) -> None:
    message = r"^training.activation_checkpointing: got true, expected false: "
    with pytest.raises(ValueError, match=message + "the image tokenizer"):
        tiny.vqvae_run(data, tmp_path / "vqvae", activation_checkpointing=True)
    theirs = tiny.vit_run(
        data, tmp_path / "vit", implementation="transformers", activation_checkpointing=True
    )
    with pytest.raises(UserError, match=message + "TransformersViT has none"):
        tiny.train(theirs)


def test_an_estimate_times_what_will_run(
    data: Path, vqvae_dir: Path, tmp_path: Path, recomputed: list[Any]
) -> None:
    config = decoder_run(data, vqvae_dir, tmp_path, decoder={})
    vqvae = estimate.tokenizer_of(config, None)
    report = check_data(str(data), image_size=tiny.SIZE, text_length=8, vocab_size=300)
    assert vqvae is not None
    for flag in (False, True):
        training = dataclasses.replace(config.training, activation_checkpointing=flag)
        changed = dataclasses.replace(config, training=training)
        lines = estimate.estimate_lines(changed, vqvae, report)
        assert any(line.startswith("weights, gradients and optimizer: ") for line in lines)
        assert bool(recomputed) == flag
