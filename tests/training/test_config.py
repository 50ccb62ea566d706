"""Settings that no run can use are refused by name, value and what is expected."""

import math
from typing import Any

import pytest

from dalle_mini_impl.training.config import DataConfig, TextConfig, TrainingConfig
from dalle_mini_impl.training.dalle import DalleRunConfig, DalleTaskConfig
from dalle_mini_impl.training.vqvae import VQVAETaskConfig


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in ("max_steps", "global_batch_size", "log_every_steps")),
        *((name, -1) for name in ("gradient_accumulation_steps", "checkpoint_every_steps")),
        *(("max_minutes", value) for value in (0.0, -1.0, math.nan)),
        *(("learning_rate", value) for value in (0.0, -1e-3, math.nan, math.inf)),
        *((name, -1.0) for name in ("weight_decay", "gradient_clip_norm")),
        ("warmup_steps", -1),
        ("gradient_clip_norm", math.nan),
        *(("ema_decay", value) for value in (-0.1, 1.0)),
        *(("decay_fraction", value) for value in (0.0, 1.1)),
        *(("betas", value) for value in ((0.9, 1.0), (-0.1, 0.9))),
        *(("seed", value) for value in (-1, 2**63)),
        ("evaluate_every_steps", 300),  # the images' interval, 1000, is no multiple
    ],
)
def test_training(name: str, value: Any) -> None:
    blamed = "sample_every_steps" if name == "evaluate_every_steps" else name
    with pytest.raises(ValueError, match=f"^training.{blamed}: got .*, expected "):
        TrainingConfig(**{name: value})


def test_the_ends_of_the_ranges_are_allowed() -> None:
    TrainingConfig(decay_fraction=1.0, warmup_steps=0, gradient_clip_norm=0.0, ema_decay=0.0)
    TrainingConfig(max_minutes=1e-3, weight_decay=0.0, seed=2**63 - 1, betas=(0.0, 0.0))


@pytest.mark.parametrize(
    ("limits", "steps_done", "minutes_used", "expected"),
    [
        ({}, 2_500, 1e9, 0.25),  # 10,000 steps where nothing is said
        ({"max_steps": 50}, 10, 1e9, 0.2),
        ({"max_minutes": 8.0}, 10**9, 2.0, 0.25),  # no hidden limit of steps
        ({"max_minutes": 8.0, "max_steps": 100}, 50, 2.0, 0.5),
        ({"max_minutes": 8.0, "max_steps": 100}, 10, 6.0, 0.75),
        ({"max_minutes": 8.0}, 0, 9.0, 1.0),
    ],
)
def test_progress_is_the_largest_of_the_limits(
    limits: dict[str, Any], steps_done: int, minutes_used: float, expected: float
) -> None:
    assert TrainingConfig(**limits).progress(steps_done, minutes_used) == pytest.approx(expected)


def decoder_run(**changes: Any) -> DalleRunConfig:
    return DalleRunConfig(data=DataConfig(source="x"), vqvae_dir="v", output_dir="o", **changes)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VQVAETaskConfig(gumbel_final_temperature=0.0), "gumbel_final_temperature: got 0"),
        (lambda: DataConfig(source="x", max_bad_fraction=1.5), "data.max_bad_fraction: got 1.5"),
        (lambda: DataConfig(source="x", caption_columns=()), "data.caption_columns: got ()"),
        (
            lambda: DataConfig(source="x", captions_from="names"),
            "data.captions_from: got names, exp",
        ),
        (
            lambda: DataConfig(source="x", captions_from="text: "),
            "data.captions_from: got text: , ",
        ),
        (lambda: TextConfig(text_length=0), "text.text_length: got 0"),
        (lambda: DalleTaskConfig(text_loss_weight=-0.1), "task.text_loss_weight: got -0.1"),
        (lambda: DalleTaskConfig(caption_dropout_probability=2.0), "task.caption_dropout_prob"),
        (lambda: VQVAETaskConfig(wavelet_weight=-1.0), "task.wavelet_weight: got -1"),
        (lambda: VQVAETaskConfig(max_shift=-1), "task.max_shift: got -1"),
        (lambda: decoder_run(num_views=0), "num_views: got 0"),
        (lambda: decoder_run(max_shift=-1), "max_shift: got -1"),
        (lambda: decoder_run(fixed_prompts=("a cat", " ")), "fixed_prompts: got an empty prompt"),
    ],
)
def test_other_sections(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("perturbed_image_fraction", 1.5, "at most 1"),
        ("perturbed_token_fraction", 2.0, "at most 1"),
        ("perturbed_neighbors", 0, "at least 1"),
        *(("gumbel_kl_ends_at", value, "above 0 and up to 1") for value in (0.0, 1.5)),
        *(("gumbel_temperature_ends_at", value, "above 0 and up to 1") for value in (0.0, 1.5)),
    ],
)
def test_vqvae_task(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^task.{name}: got {value}, expected {expected}$"):
        VQVAETaskConfig(**{name: value})
