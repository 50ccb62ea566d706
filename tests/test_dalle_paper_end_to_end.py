"""The scaled-down preset of DALL-E as published: it trains, saves, loads and generates."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from dalle_mini_impl.config import load_config, read_config
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.models.dalle import Dalle
from dalle_mini_impl.models.dalle_config import DalleConfig
from dalle_mini_impl.pipeline import TextToImagePipeline
from dalle_mini_impl.training.config import DataConfig
from dalle_mini_impl.training.dalle import DalleRunConfig
from dalle_mini_impl.training.tracking import TrackingConfig
from tests.reference import tiny

PRESETS = Path(__file__).parents[1] / "configs" / "dalle_paper"


def test_scaled_down_preset_trains_saves_loads_and_generates(tmp_path: Path) -> None:
    preset = read_config(DalleRunConfig, PRESETS / "small_dalle.yaml")
    tiny.build_vqvae(image_size=32).save_pretrained(tmp_path / "vqvae")  # 4 x 4 tokens
    config = dataclasses.replace(
        preset,
        data=DataConfig(source=str(tiny.write_data(tmp_path / "data"))),
        vqvae_dir=str(tmp_path / "vqvae"),
        output_dir=str(tmp_path / "run"),
        fixed_prompts=("a red disc",),
        tracking=TrackingConfig(mode="disabled"),
        training=dataclasses.replace(
            preset.training, max_minutes=None, max_steps=3, global_batch_size=8, log_every_steps=1
        ),
    )
    folder, _ = tiny.train(config)
    losses = tiny.losses(tmp_path / "run")
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    pipeline = TextToImagePipeline.from_pretrained(folder)
    assert pipeline.dalle.config.decoder == preset.decoder
    assert not pipeline.generates_any_order
    generated = pipeline("a blue box", num_images=2, seed=3)
    assert [image.size for image in generated.images] == [(32, 32)] * 2
    upper = pipeline.inpaint("a blue box", generated.images[0], keep_rows=2, seed=3)
    assert len(upper.images) == 1
    with pytest.raises(UserError, match="this model generates from the top left"):
        pipeline.inpaint("a blue box", generated.images[0], keep_fraction=0.5)


def test_the_published_preset_has_the_published_sizes() -> None:
    config = read_config(DalleRunConfig, PRESETS / "dalle.yaml")
    decoder = config.decoder
    assert (decoder.num_layers, decoder.num_heads, decoder.head_dim) == (64, 62, 64)
    assert (decoder.hidden_size, decoder.intermediate_size) == (3968, 4 * 3968)
    with torch.device("meta"):
        text = dataclasses.asdict(config.text)
        model = Dalle(
            DalleConfig(decoder=decoder, **text, codebook_levels=(8192,), image_grid_size=(32, 32))
        )
    millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    assert millions == pytest.approx(12_000, rel=0.03)  # "12 billion"
    small = read_config(DalleRunConfig, PRESETS / "small_dalle.yaml")
    assert small.task == config.task
    assert small.decoder.block_options == config.decoder.block_options
    # The published loss is 1/8 text + 7/8 image: 7/8 of ours. Its clipping is scaled like it.
    assert 7 / 8 * config.task.text_loss_weight == pytest.approx(1 / 8)
    assert config.training.gradient_clip_norm == pytest.approx(4 * 8 / 7)


@pytest.mark.parametrize(
    "options", [["--decoder.attention", "dalle"], ["--decoder.has_target_positions", "false"]]
)
def test_random_order_is_refused_before_the_run(options: list[str], tmp_path: Path) -> None:
    needed = ["--data.source", "x", "--vqvae_dir", "y", "--output_dir", str(tmp_path / "run")]
    order = ["--task.random_order_probability", "0.5"]
    for arguments in (needed + order, needed + options):
        load_config(DalleRunConfig, arguments, description="")
    with pytest.raises(UserError) as caught:
        load_config(DalleRunConfig, needed + options + order, description="")
    message = str(caught.value)
    assert message.startswith("task.random_order_probability: got 0.5, expected 0 with decoder.att")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("max_zoom", "0.9", "1 to 4.0"),
        ("task.bpe_dropout_probability", "1.5", "0"),
        ("decoder.kernel_size", "4", "an odd number from 1 on"),
        ("decoder.attention", "row", "one of ['dense', 'dall"),
    ],
)
def test_bad_values_are_named(option: str, value: str, expected: str) -> None:
    needed = ["--data.source", "x", "--vqvae_dir", "y", "--output_dir", "z"]
    arguments: list[Any] = [*needed, f"--{option}", value]
    with pytest.raises(UserError) as caught:
        load_config(DalleRunConfig, arguments, description="")
    assert str(caught.value).startswith(f"{option}: got {value}, expected {expected}")
