"""This project's tokenizer, reader and whole runs in every comparison; see ours.py."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.ceilings import attention_flops, count_flops
from benchmarks.ours import (
    GUIDANCE_SCALE,
    build_pipeline,
    build_trainer,
    count_trainer_flops,
    trainer_step,
)
from benchmarks.timing import Job, Precision, require_falling, require_training
from dalle_mini_impl.data.images import decode_image, image_to_pixels, resize_and_crop
from dalle_mini_impl.data.loading import load_all_pixels
from dalle_mini_impl.data.pairs import open_pairs
from dalle_mini_impl.data.token_dataset import Variation, build_token_dataset
from dalle_mini_impl.hardware import has_fast_bf16
from dalle_mini_impl.models.dalle import Dalle
from dalle_mini_impl.models.dalle_config import DalleConfig, DecoderConfig
from dalle_mini_impl.training.config import DataConfig, TextConfig, TrainingConfig
from dalle_mini_impl.training.dalle import DalleRunConfig, DalleTask, DalleTaskConfig, train_dalle
from dalle_mini_impl.training.optimizer import build_optimizers
from dalle_mini_impl.training.tracking import TrackingConfig
from dalle_mini_impl.training.vqvae import VQVAETask, VQVAETaskConfig
from vqvae import VQVAE, VQVAEConfig
from vqvae.quantizers import GumbelQuantizer, VectorQuantizer

QUALITY_STEPS = 200  # over which the rate decays


def tokenizer(image_size: int) -> VQVAE:
    """Build the default image tokenizer for images of a size, laid out as training does."""
    vqvae = VQVAE(VQVAEConfig(image_size=image_size))
    return vqvae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def tokenizer_job(
    work: Literal["encode", "decode", "train"],
    pixels: Tensor,
    precision: Precision,
    *,
    compiled: bool = False,
) -> Job:
    """Encode, decode or train the default image tokenizer.

    Args:
        work: Which of the three.
        pixels: Images in [-1, 1].
        precision: bf16 is autocast, as in training.
        compiled: Train with ``training.compile``.

    Returns:
        One batch; items are images.
    """
    torch.manual_seed(0)
    vqvae = tokenizer(pixels.shape[-1])
    run: Callable[[], object]
    if work == "train":
        as_bytes = ((pixels + 1) * 127.5).to(torch.uint8)
        config = VQVAETaskConfig()
        task = VQVAETask(as_bytes, as_bytes, config, sample_weights=None, vqvae=vqvae)
        trainer = build_trainer(
            vqvae, task, batch=len(pixels), precision=precision, compile=compiled
        )
        run = step = trainer_step(trainer)
        flops = count_trainer_flops(trainer, with_batched=True)
        require_training(step, steps=5, compiled=compiled)
    else:
        vqvae.eval()
        token_ids = vqvae.encode_to_token_ids(pixels)
        if vqvae.decode_from_token_ids(token_ids).shape != pixels.shape:
            raise ValueError("the tokenizer returns images of another size")

        def run() -> object:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                if work == "encode":
                    return vqvae.encode_to_token_ids(pixels)
                return vqvae.decode_from_token_ids(token_ids)

        flops = count_flops(run, with_batched=True)
    return Job(run=run, items=len(pixels), flops=flops)


def tokenizer_to_quality(train: Tensor) -> tuple[Callable[[], object], Callable[[Tensor], Tensor]]:
    """Train a tokenizer of 4 x 4 px patches with the trainer's own step.

    Args:
        train: Images as bytes, (images, 3, side, side).

    Returns:
        A training step, and the way of images in [-1, 1] through single codes.
    """
    torch.manual_seed(0)
    config = VQVAEConfig(
        image_size=train.shape[-1],
        patch_size=4,
        channels=(128,),
        num_encoder_blocks=2,
        num_decoder_blocks=2,
        fsq_levels=(8, 5, 5, 5),
    )
    vqvae = VQVAE(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    task = VQVAETask(train, train, VQVAETaskConfig(), sample_weights=None, vqvae=vqvae)
    trainer = build_trainer(
        vqvae,
        task,
        batch=32,
        precision="bfloat16" if has_fast_bf16() else "float32",
        max_steps=QUALITY_STEPS,
        learning_rate=3e-3,
        betas=(0.9, 0.99),
        weight_decay=0.0,
        decay_fraction=0.4,
        warmup_steps=30,
    )

    def rebuild(pixels: Tensor) -> Tensor:
        vqvae.eval()
        return vqvae.decode_from_token_ids(vqvae.encode_to_token_ids(pixels))

    return trainer_step(trainer), rebuild


@dataclass(frozen=True)
class FirstStep:
    """The first step of a discrete VAE, to be compared with that of another program."""

    loss: float
    codebook_gradient: float
    """Its norm; without it any mixture of fresh codes would do, since they average to nothing."""

    def is_like(self, other: "FirstStep") -> bool:
        """Tell whether both may be one computation with other noise."""
        same_loss = abs(self.loss / other.loss - 1) < 0.05
        return same_loss and abs(self.codebook_gradient / other.codebook_gradient - 1) < 0.2


def gumbel_training(
    encoder: nn.Module,
    decoder: nn.Module,
    codebook: Tensor,
    images: Tensor,
    precision: Precision,
    *,
    expected_first_step: FirstStep | None = None,
    compiled: bool = False,
) -> Job:
    """Train a discrete VAE with our Gumbel quantizer between networks that are given.

    The mathematics is that of DALLE-pytorch's DiscreteVAE by default: squared error, temperature
    0.9, no KL term.

    Args:
        encoder: Images to logits over the codes.
        decoder: Codes to images.
        codebook: Rows to start from, (codes, width).
        images: In [-1, 1].
        precision: bf16 is autocast.
        expected_first_step: What the first step must be like, but for its noise.
        compiled: Whether torch.compile makes the forward and backward pass.

    Returns:
        One training step; items are images.

    Raises:
        ValueError: If the first step is another one, or the loss does not fall.
    """
    codes, width = codebook.shape
    quantizer = GumbelQuantizer(codebook_size=codes, code_dim=width, kl_weight=0.0)
    quantizer.codebook.data.copy_(codebook)
    quantizer.temperature.fill_(0.9)
    model = nn.Sequential(encoder, quantizer, decoder)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pixels = images.contiguous(memory_format=torch.channels_last)
    [optimizer] = build_optimizers(
        model, kind="adamw", learning_rate=3e-4, weight_decay=0.0, betas=(0.9, 0.99)
    )

    def eager_loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            reconstructions = decoder(quantizer(encoder(pixels)).quantized_latents)
            return F.mse_loss(reconstructions.float(), pixels)

    first: list[Tensor] = []

    def first_step() -> None:
        first.append(eager_loss())
        first[0].backward()

    flops = count_flops(first_step, with_batched=True)
    gradient = quantizer.codebook.grad
    assert gradient is not None
    found = FirstStep(float(first[0].detach()), float(gradient.norm()))
    if expected_first_step and not found.is_like(expected_first_step):
        raise ValueError(f"the first step is {found}, the peer's {expected_first_step}")
    optimizer.zero_grad()
    find_loss = torch.compile(eager_loss, dynamic=False) if compiled else eager_loss

    def step() -> float:
        loss = find_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    require_training(step, steps=5, compiled=compiled)
    return Job(run=step, items=len(images), flops=flops)


def code_lookup(vectors: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    """Find the nearest code of each vector, by cosine.

    Args:
        vectors: (count, width), of any length.
        codebook: (codes, width), rows of length 1.

    Returns:
        A function that returns the indices, (count,).
    """
    quantizer = VectorQuantizer(codebook_size=len(codebook), code_dim=codebook.shape[1]).eval()
    quantizer.codebook.copy_(codebook)
    latents = vectors.T.reshape(1, codebook.shape[1], 1, len(vectors))
    return lambda: quantizer.encode(latents).flatten()


def write_model(folder: Path, decoder: DecoderConfig | None = None) -> None:
    """Write a model folder of the demo's size with random weights.

    Args:
        folder: Where to.
        decoder: Another size.
    """
    torch.manual_seed(0)
    vqvae = VQVAE(VQVAEConfig())
    config = DalleConfig(
        decoder=decoder or DecoderConfig(hidden_size=256, num_layers=4, num_heads=4),
        vocab_size=2048,
        text_length=16,
        codebook_levels=vqvae.codebook_levels,
        image_grid_size=vqvae.image_grid_size,
    )
    dalle = Dalle(config)
    with torch.no_grad():
        dalle.image_head.rows.normal_(std=0.02)
    pipeline = build_pipeline(dalle, vqvae)
    pipeline.sampling_config = dataclasses.replace(
        pipeline.sampling_config, guidance_scale=GUIDANCE_SCALE
    )
    pipeline.save_pretrained(folder)


def read_images(folder: Path, image_size: int) -> int:
    """Open a folder of captioned images and decode all of them, as training begins.

    Args:
        folder: Holds ``x.jpg`` beside ``x.txt``.
        image_size: Side of the square images in pixels.

    Returns:
        Number of images read.
    """
    pixels, kept, _ = load_all_pixels(open_pairs(str(folder)), image_size=image_size)
    return len(kept) if len(pixels) == len(kept) else 0


@dataclass(frozen=True, kw_only=True)
class WholeRun:
    """What decides the cost of a whole training run."""

    vqvae: VQVAEConfig
    decoder: DecoderConfig
    text: TextConfig
    batch: int


def default_run() -> WholeRun:
    """Take what ``train_vqvae.py`` and ``train_dalle.py`` do unless told otherwise."""
    return WholeRun(
        vqvae=VQVAEConfig(),
        decoder=DecoderConfig(),
        text=TextConfig(),
        batch=TrainingConfig().global_batch_size,
    )


def toy_run() -> WholeRun:
    """Take the smallest sizes, to see that everything runs."""
    return WholeRun(
        vqvae=VQVAEConfig(image_size=32, channels=(8, 16)),
        decoder=DecoderConfig(hidden_size=32, num_layers=1, num_heads=2),
        text=TextConfig(vocab_size=300, text_length=8),
        batch=4,
    )


def matched_run(vae: dict[str, Any], dalle: dict[str, Any], *, batch: int) -> WholeRun:
    """Take DALLE-pytorch's sizes: images, tokens, vocabularies, width, depth, heads, batch.

    Args:
        vae: Arguments of its ``DiscreteVAE``; ours has the same grid and number of codes.
        dalle: Arguments of its ``DALLE``.
        batch: Images per step.

    Returns:
        A run of ours.
    """
    return WholeRun(
        vqvae=VQVAEConfig(
            image_size=vae["image_size"], quantizer="vq", vq_codebook_size=vae["num_tokens"]
        ),
        decoder=DecoderConfig(
            hidden_size=dalle["dim"], num_layers=dalle["depth"], num_heads=dalle["heads"]
        ),
        text=TextConfig(vocab_size=dalle["num_text_tokens"], text_length=dalle["text_seq_len"]),
        batch=batch,
    )


def whole_training(folder: Path, run: WholeRun, *, epochs: int) -> Job:
    """Train from a folder: as many steps as epochs, and one batch of it read and tokenized.

    So each image is read and tokenized once per ``epochs`` steps that it takes part in.

    Args:
        folder: Images with captions.
        run: Sizes.
        epochs: Steps per batch that is read.

    Returns:
        The job; items are images that went through a step.
    """
    torch.manual_seed(0)
    vqvae = VQVAE(run.vqvae).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    config = DalleConfig(
        decoder=run.decoder,
        vocab_size=run.text.vocab_size,
        text_length=run.text.text_length,
        codebook_levels=vqvae.codebook_levels,
        image_grid_size=vqvae.image_grid_size,
    )
    pipeline = build_pipeline(dalle := Dalle(config), vqvae)
    pairs = open_pairs(str(folder))
    pixels, kept, _ = load_all_pixels(pairs, image_size=run.vqvae.image_size)
    tokens = build_token_dataset(
        [pairs[index] for index in kept],
        pixels,
        vqvae=vqvae,
        text_tokenizer=pipeline.text_tokenizer,
        variation=Variation(),
        cache_dir=folder.parent / "tokens",
    )
    task = DalleTask(
        tokens,
        tokens,
        DalleTaskConfig(),
        sample_weights=None,
        identity="",
        pipeline=pipeline,
        fixed_prompts=(),
    )
    precision: Precision = "bfloat16" if has_fast_bf16() else "float32"
    step = trainer_step(build_trainer(dalle, task, batch=run.batch, precision=precision))
    require_falling([step() for _ in range(5)])
    flops = count_flops(step) + attention_flops(
        layers=run.decoder.num_layers,
        width=run.decoder.hidden_size,
        length=config.sequence_length,
        rows=run.batch,
    )

    def train() -> None:
        first = [pairs.read_image(index) for index in range(min(run.batch, len(pairs)))]
        batch = torch.stack([read_square(data, run.vqvae.image_size) for data in first])
        vqvae.encode_to_token_ids(batch)
        for _ in range(epochs):
            step()

    size, width, layers = run.vqvae.image_size, run.decoder.hidden_size, run.decoder.num_layers
    return Job(
        run=train,
        items=run.batch * epochs,
        flops=flops * epochs,
        note=f"{size} px, {width} wide, {layers} layers, batch {run.batch}, {precision}",
    )


def read_square(data: bytes, size: int) -> Tensor:
    """Decode one image file as the reader does, to pixels in [-1, 1]."""
    image = decode_image(data, source="", min_side=2 * size)
    return image_to_pixels(resize_and_crop(image, size))


def data_wait(folder: Path, out: Path, *, steps: int) -> float:
    """Run ``train_dalle`` by default for some steps and read what it says of itself.

    Args:
        folder: Images with captions.
        out: For the run; made here.
        steps: Optimizer updates.

    Returns:
        Fraction of the time in which the loop waited for data, in [0, 1].
    """
    VQVAE(VQVAEConfig()).save_pretrained(out / "vqvae")
    config = DalleRunConfig(
        data=DataConfig(source=str(folder)),
        vqvae_dir=str(out / "vqvae"),
        output_dir=str(out / "dalle"),
        training=TrainingConfig(max_steps=steps, log_every_steps=steps),
        tracking=TrackingConfig(mode="disabled"),
    )
    train_dalle(config)
    lines = (out / "dalle" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return next(row[key] for row in rows for key in row if key == "train/data_wait_fraction")
