"""Tiny data, models and runs: what a test of training needs, in a second or two."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from dalle_mini_impl.clip_ranker import ClipRanker
from dalle_mini_impl.data.text_tokenizer import TextTokenizer, train_text_tokenizer
from dalle_mini_impl.models.clip import Clip, ClipConfig, TextTowerConfig, TowersConfig
from dalle_mini_impl.models.dalle_config import DalleConfig, DecoderConfig
from dalle_mini_impl.models.seq2seq import EncoderDecoderConfig
from dalle_mini_impl.models.text_to_image import build_text_to_image
from dalle_mini_impl.models.vit import ViTConfig
from dalle_mini_impl.pipeline import TextToImagePipeline
from dalle_mini_impl.sampling.beam_search import BeamConfig
from dalle_mini_impl.sampling.sampler import SamplingConfig
from dalle_mini_impl.training.clip import ClipRunConfig, train_clip
from dalle_mini_impl.training.config import DataConfig, TextConfig, TrainingConfig
from dalle_mini_impl.training.dalle import DalleRunConfig, DalleTaskConfig, train_dalle
from dalle_mini_impl.training.tracking import TrackingConfig
from dalle_mini_impl.training.translation import (
    TextPairsConfig,
    TranslationRunConfig,
    train_translation,
)
from dalle_mini_impl.training.vit import LabelledDataConfig, ViTRunConfig, train_vit
from dalle_mini_impl.training.vqvae import VQVAERunConfig, train_vqvae
from tests.reference.log_lines import log_lines
from tests.reference.random_weights import randomize
from vqvae import VQVAE, VQVAEConfig

Changes = dict[str, Any] | None
SIZE = 16
PIXEL_SIZE = (SIZE, SIZE)
COLORS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = ("disc", "box")
CAPTIONS = tuple(f"a {color} {shape}" for color in COLORS for shape in SHAPES)
# Kernels of 3 x 3, so that the order of axes in memory matters.
VQVAE_SIZES = VQVAEConfig(
    image_size=SIZE,
    patch_size=4,
    channels=(8, 12),
    num_encoder_blocks=1,
    num_decoder_blocks=1,
    encoder_kernel_size=3,
    fsq_levels=(4, 3, 3),
    vq_codebook_size=16,
    vq_code_dim=4,
)
DECODER_SIZES = DecoderConfig(hidden_size=16, num_layers=2, num_heads=2, dropout_probability=0.1)
WITH_ENCODER = {"architecture": "encoder_decoder", "num_encoder_layers": 1}
WIDTHS: dict[str, Any] = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 24}
TOWERS = TowersConfig(
    image=ViTConfig(patch_size=8, num_layers=1, **WIDTHS),
    text=TextTowerConfig(num_layers=1, **WIDTHS),
    embedding_size=8,
)
TRAINING = TrainingConfig(
    max_steps=6,
    global_batch_size=8,
    learning_rate=3e-3,
    warmup_steps=2,
    log_every_steps=1,
    mixed_precision="no",
)


def training_config(*, every: int = 3, **changes: Any) -> TrainingConfig:
    """Six steps, unless told otherwise; `every` so many an evaluation, samples and a checkpoint."""
    names = ("evaluate_every_steps", "sample_every_steps", "checkpoint_every_steps")
    return dataclasses.replace(TRAINING, **(dict.fromkeys(names, every) | changes))


def render_image(number: int) -> Image.Image:
    """A colored shape on white; numbers run through all twelve captions, at several places."""
    color, shape = COLORS[number // 2 % 6], SHAPES[number % 2]
    image = Image.new("RGB", (SIZE, SIZE), "white")
    left, top = 1 + number % 5, 1 + number % 3
    box = (left, top, left + 9, top + 9)
    draw = ImageDraw.Draw(image)
    (draw.ellipse if shape == "disc" else draw.rectangle)(box, fill=color)
    return image


def write_data(folder: Path, *, count: int = 30) -> Path:
    """Write an image folder with `metadata.jsonl`; every sixth image is held out."""
    folder.mkdir(parents=True)
    lines = []
    for number in range(count):
        render_image(number).save(folder / f"{number}.png")
        caption = CAPTIONS[number % len(CAPTIONS)]
        row: dict[str, Any] = {"file_name": f"{number}.png", "color": caption.split()[1]}
        row |= {"text": caption, "texts": [f"{caption} on white"]}
        lines.append(json.dumps(row | {"split": "val" if number % 6 == 5 else "train"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def vqvae_run(
    data: Path, out: Path, *, tracking: str = "disabled", vqvae: Changes = None, **training: Any
) -> VQVAERunConfig:
    """A tokenizer run of six steps, unless told otherwise."""
    return VQVAERunConfig(
        data=DataConfig(source=str(data)),
        output_dir=str(out),
        vqvae=dataclasses.replace(VQVAE_SIZES, **(vqvae or {})),
        training=training_config(**training),
        tracking=TrackingConfig(mode=tracking),  # type: ignore[arg-type]
    )


def dalle_run(
    data: Path,
    vqvae_dir: Path,
    out: Path,
    *,
    tracking: str = "disabled",
    task: Changes = None,
    decoder: Changes = None,
    dropout_probability: float = 0.1,
    **training: Any,
) -> DalleRunConfig:
    """A decoder run of six steps, unless told otherwise."""
    return DalleRunConfig(
        data=DataConfig(source=str(data)),
        vqvae_dir=str(vqvae_dir),
        output_dir=str(out),
        num_views=2,
        max_shift=2,
        fixed_prompts=("a red disc", "a blue box"),
        text=TextConfig(vocab_size=300, text_length=8),
        decoder=dataclasses.replace(
            DECODER_SIZES, dropout_probability=dropout_probability, **(decoder or {})
        ),
        task=DalleTaskConfig(**(task or {})),
        training=training_config(**training),
        tracking=TrackingConfig(mode=tracking),  # type: ignore[arg-type]
    )


def write_text_pairs(path: Path) -> Path:
    """Write thirty pairs of a made-up language: English captions, and their words backwards."""
    captions = [f"{caption} {place}" for caption in CAPTIONS for place in ("above", "below", "")]
    lines = [f"{text}\t{' '.join(reversed(text.split()))}" for text in captions]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def translation_run(table: Path, out: Path, **training: Any) -> TranslationRunConfig:
    """A translation run of six steps, unless told otherwise."""
    return TranslationRunConfig(
        data=TextPairsConfig(source=str(table), held_out_percent=20),
        output_dir=str(out),
        text=TextConfig(vocab_size=300, text_length=12),
        model=EncoderDecoderConfig(num_encoder_layers=1, num_decoder_layers=1, **WIDTHS),
        beam=BeamConfig(num_beams=2),
        training=training_config(**training),
        tracking=TrackingConfig(mode="disabled"),
    )


def vit_run(
    data: Path, out: Path, *, implementation: str = "ours", **training: Any
) -> ViTRunConfig:
    """A classifier run of six steps, unless told otherwise: which color is it?"""
    source = {"source": str(data), "label": "color", "held_out_percent": 30}
    return ViTRunConfig(
        data=LabelledDataConfig(families=(), image_size=SIZE, **source),  # type: ignore[arg-type]
        output_dir=str(out),
        implementation=implementation,  # type: ignore[arg-type]
        model=TOWERS.image,
        training=training_config(**training),
        tracking=TrackingConfig(mode="disabled"),
    )


def clip_run(
    data: Path, out: Path, *, loss: str = "softmax", tracking: str = "disabled", **training: Any
) -> ClipRunConfig:
    """A CLIP run of six steps, unless told otherwise."""
    return ClipRunConfig(
        data=DataConfig(source=str(data)),
        output_dir=str(out),
        image_size=SIZE,
        text=TextConfig(vocab_size=300, text_length=8),
        model=dataclasses.replace(TOWERS, loss=loss),  # type: ignore[arg-type]
        training=training_config(**training),
        tracking=TrackingConfig(mode=tracking),  # type: ignore[arg-type]
    )


def build_ranker(*, seed: int = 0, **towers: Any) -> ClipRanker:
    """A CLIP with random weights and the tokenizer of the twelve captions."""
    text_tokenizer = build_text_tokenizer()
    config = ClipConfig(
        towers=dataclasses.replace(TOWERS, **towers),
        image_size=SIZE,
        vocab_size=text_tokenizer.vocab_size,
        text_length=text_tokenizer.text_length,
    )
    model = Clip(config).eval()
    randomize(model, seed=seed)
    with torch.no_grad():  # wide enough that rankings differ between rankers
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("bias"):
                parameter.add_(1)
    return ClipRanker(model, text_tokenizer)


def train(config: Any, **options: Any) -> tuple[Path, list[str]]:
    """Run any config; return the model folder and the logged lines. Global flags are restored."""
    before = torch.get_float32_matmul_precision()
    run: Callable[..., Path] = {
        VQVAERunConfig: train_vqvae,
        DalleRunConfig: train_dalle,
        TranslationRunConfig: train_translation,
        ViTRunConfig: train_vit,
        ClipRunConfig: train_clip,
    }[type(config)]
    try:
        with log_lines() as lines:
            return run(config, **options), lines
    finally:
        torch.set_float32_matmul_precision(before)


def build_vqvae(*, seed: int = 0, **changes: Any) -> VQVAE:
    """A tokenizer with random weights, wide enough for its tokens to differ."""
    model = VQVAE(dataclasses.replace(VQVAE_SIZES, **changes)).eval()
    randomize(model, seed=seed, scale=0.4)
    return model


def build_text_tokenizer(*, text_length: int = 8) -> TextTokenizer:
    return TextTokenizer(train_text_tokenizer(CAPTIONS, vocab_size=300), text_length)


def build_pipeline(*, seed: int = 0, vqvae: Changes = None, **decoder: Any) -> TextToImagePipeline:
    """A pipeline whose decoder has random weights: its images mean nothing, but all differ."""
    image_tokenizer, text_tokenizer = build_vqvae(**(vqvae or {})), build_text_tokenizer()
    config = DalleConfig(
        decoder=dataclasses.replace(DECODER_SIZES, **decoder),
        vocab_size=text_tokenizer.vocab_size,
        text_length=text_tokenizer.text_length,
        codebook_levels=image_tokenizer.codebook_levels,
        image_grid_size=image_tokenizer.image_grid_size,
    )
    dalle = build_text_to_image(config).eval()
    randomize(dalle, seed=seed)
    return TextToImagePipeline(
        dalle=dalle,
        vqvae=image_tokenizer,
        text_tokenizer=text_tokenizer,
        sampling_config=SamplingConfig(guidance_scale=2.0),
    )


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    """The training loss of every step."""
    return [row["train/loss"] for row in read_metrics(out) if "train/loss" in row]
